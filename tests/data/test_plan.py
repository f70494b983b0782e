"""The plan is a pure function: every sample once an epoch, the same rows for whoever asks."""

from __future__ import annotations

import pickle
from dataclasses import replace
from itertools import islice
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mllm.data.plan import Plan

ROW = 32
LENGTHS = st.lists(st.integers(1, ROW), min_size=1, max_size=60)
PLANS = st.builds(
    Plan,
    lengths=LENGTHS,
    seq_length=st.just(ROW),
    rows_per_step=st.integers(1, 7),
    seed=st.integers(0, 5),
    packing=st.booleans(),
)


def fresh(plan: Plan) -> Plan:
    return Plan(plan.lengths, plan.seq_length, plan.rows_per_step, plan.seed, plan.packing)


@given(PLANS)
@settings(deadline=None)
def test_each_epoch_holds_every_sample_once(plan: Plan) -> None:
    for epoch in range(3):
        samples = sorted(sample for row in plan.epoch(epoch) for sample in row)
        assert samples == list(range(len(plan.lengths)))


@given(PLANS, st.permutations(range(12)))
@settings(deadline=None)
def test_rows_are_the_same_in_any_order_of_asking(plan: Plan, order: list[int]) -> None:
    straight = {step: fresh(plan).rows(step) for step in range(12)}
    assert {step: plan.rows(step) for step in order} == straight


@given(PLANS)
@settings(deadline=None)
def test_steps_walk_the_epochs_without_gap_or_seam(plan: Plan) -> None:
    rows = [row for epoch in range(3) for row in plan.epoch(epoch)]
    steps = len(rows) // plan.rows_per_step
    assert [row for step in range(steps) for row in plan.rows(step)] == rows[: steps * plan.rows_per_step]


@given(PLANS, st.integers(1, 4))
@settings(deadline=None)
def test_steps_cover_the_epochs_and_no_step_more(plan: Plan, epochs: int) -> None:
    rows = sum(len(plan.epoch(epoch)) for epoch in range(epochs))
    steps = plan.steps(epochs)
    assert (steps - 1) * plan.rows_per_step < rows <= steps * plan.rows_per_step


@pytest.mark.parametrize(("epochs", "steps"), [(0.07, 7), (0.5, 50), (1, 100), (1.5, 150), (0.0, 1), (0.001, 1)])
def test_parts_of_an_epoch_round_up_without_float_noise(epochs: float, steps: int) -> None:
    assert Plan([ROW] * 100, ROW, rows_per_step=1).steps(epochs) == steps


def test_epochs_and_seeds_shuffle_differently() -> None:
    plan = Plan(list(range(1, 31)), ROW, rows_per_step=2)
    orders = [plan.epoch(0), plan.epoch(1), replace(plan, seed=1).epoch(0)]
    assert all(a != b for a, b in zip(orders, orders[1:] + orders[:1], strict=True))


@given(PLANS)
@settings(deadline=None)
def test_a_changed_copy_remembers_nothing_of_the_first(plan: Plan) -> None:
    plan.rows(9)
    copy = replace(plan, seed=plan.seed + 1)
    assert copy.rows(9) == fresh(copy).rows(9)


@pytest.mark.parametrize(
    "change",
    [
        {"lengths": [3, 4, 6]},
        {"lengths": [4, 3, 5]},
        {"lengths": [3, 4, 5, 1]},
        {"seq_length": 33},
        {"rows_per_step": 3},
        {"seed": 1},
        {"packing": False},
    ],
)
def test_fingerprint_changes_when_anything_changes(change: dict[str, Any]) -> None:
    plan = Plan([3, 4, 5], ROW, rows_per_step=2)
    assert plan.fingerprint() == fresh(plan).fingerprint()
    assert plan.fingerprint() != replace(plan, **change).fingerprint()


@given(PLANS, st.integers(0, 5))
@settings(deadline=None)
def test_counts_are_those_of_the_rows(plan: Plan, step: int) -> None:
    rows, counts = plan.rows(step), plan.counts(step)
    assert counts["samples"] == sum(len(row) for row in rows)
    assert counts["tokens"] == sum(plan.lengths[sample] for row in rows for sample in row)
    assert 0 < counts["fill"] <= 1
    assert 0 < plan.fill() <= 1


def test_a_plan_travels_to_workers_that_are_spawned() -> None:
    plan = Plan([5, 6, 7] * 9, ROW, rows_per_step=2, seed=3)
    plan.rows(40)
    travelled = pickle.loads(pickle.dumps(plan))
    assert [travelled.rows(step) for step in range(9)] == [plan.rows(step) for step in range(9)]


def test_only_two_epochs_are_remembered() -> None:
    plan = Plan([5] * 10, ROW, rows_per_step=1)
    list(islice((plan.row(number) for number in range(100)), 100))
    assert len(plan._packed) <= 2


def test_a_plan_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="no samples to plan"):
        Plan([], ROW, rows_per_step=1)
