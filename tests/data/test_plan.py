"""The plan is a pure function: every record once an epoch, the same rows for whoever asks, at any size."""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mllm.data.packing import pack
from mllm.data.plan import Plan
from mllm.data.planning import windows
from mllm.data.planning.columns import Columns
from mllm.data.planning.mixture import MixtureConfig, SourceShare

ROW = 32


@pytest.fixture(autouse=True, scope="module")
def small_windows() -> Iterator[None]:
    """Windows of about 16 samples, so that a handful of samples makes several."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(windows, "WINDOW", 16)
        yield


def make_columns(records: list[tuple[int, list[tuple[int, int]]]]) -> Columns:
    """Records of (source, kinds), each kind of (length, images)."""
    rows = [(length, images, source, n) for n, (source, kinds) in enumerate(records) for length, images in kinds]
    length, images, source, group = np.array(rows, dtype=np.int64).T
    ints = (length.astype(np.int32), images.astype(np.int32), source.astype(np.int16), group)
    return Columns(*ints, weight=np.ones(len(length), dtype=np.float32))


KINDS = st.lists(st.tuples(st.integers(1, ROW), st.integers(0, 2)), min_size=1, max_size=3)
COLUMNS = st.lists(st.tuples(st.integers(0, 2), KINDS), min_size=1, max_size=50).map(make_columns)
PLANS = st.builds(
    Plan,
    columns=COLUMNS,
    mixture=st.just(MixtureConfig()),
    seq_length=st.just(ROW),
    rows_per_step=st.sampled_from([1, 2, 3, 7, 8, 16, 24]),
    seed=st.integers(-3, 3),
    packing=st.booleans(),
)


def fresh(plan: Plan, **changes: Any) -> Plan:
    return replace(plan, **changes)


@given(PLANS)
@settings(deadline=None)
def test_each_epoch_holds_every_record_once_as_one_of_its_kinds(plan: Plan) -> None:
    for epoch in range(3):
        groups = [int(plan.columns.group[sample]) for row in plan.epoch(epoch) for sample in row]
        assert sorted(groups) == sorted(set(plan.columns.group.tolist()))


@given(PLANS)
@settings(deadline=None)
def test_no_row_is_longer_than_a_row(plan: Plan) -> None:
    assert all(plan.columns.length[row].sum() <= ROW for row in plan.epoch(0))


@given(PLANS, st.permutations(range(12)))
@settings(deadline=None, max_examples=40)
def test_rows_are_the_same_in_any_order_of_asking(plan: Plan, asked: list[int]) -> None:
    straight = {step: fresh(plan).rows(step) for step in range(12)}
    assert {step: plan.rows(step) for step in asked} == straight


@given(PLANS)
@settings(deadline=None)
def test_steps_walk_the_epochs_without_gap_or_seam(plan: Plan) -> None:
    rows = [row for epoch in range(3) for row in plan.epoch(epoch)]
    steps = len(rows) // plan.rows_per_step
    assert [row for step in range(steps) for row in fresh(plan).rows(step)] == rows[: steps * plan.rows_per_step]


@given(PLANS)
@settings(deadline=None)
def test_rows_of_a_window_depend_on_nothing_before_it(plan: Plan) -> None:
    plan.rows(9)
    for window in range(plan.windows.number(1)):
        assert plan.windows.rows(1, window) == fresh(plan).windows.rows(1, window)
        assert plan.windows.count(1, window) == len(plan.windows.rows(1, window))


@given(PLANS)
@settings(deadline=None)
def test_dealing_only_reorders_the_rows_of_a_window(plan: Plan) -> None:
    packed = [plan.windows.rows(0, window) for window in range(plan.windows.number(0))]
    dealt = iter(plan.epoch(0))
    for rows in packed:
        assert sorted(rows) == sorted(next(dealt) for _ in rows)


@given(st.lists(st.integers(1, ROW), min_size=16, max_size=23), st.booleans(), st.integers(0, 5))
@settings(deadline=None)
def test_a_set_of_one_window_is_plainly_shuffled_into_steps(lengths: list[int], packing: bool, seed: int) -> None:
    plan = Plan.from_lengths(lengths, ROW, rows_per_step=8, seed=seed, packing=packing)
    packed = plan.windows.rows(0, 0)
    assert plan.windows.number(0) == 1
    for step in range(len(packed) // 8):
        assert sorted(plan.rows(step)) == sorted(packed[8 * step : 8 * step + 8])


@given(PLANS, st.integers(1, 4))
@settings(deadline=None)
def test_steps_cover_the_epochs_and_no_step_more(plan: Plan, epochs: int) -> None:
    rows = sum(len(plan.epoch(epoch)) for epoch in range(epochs))
    steps = fresh(plan).steps(epochs)
    assert (steps - 1) * plan.rows_per_step < rows <= steps * plan.rows_per_step
    assert rows == sum(fresh(plan).num_rows(epoch) for epoch in range(epochs))


@pytest.mark.parametrize(("epochs", "steps"), [(0.07, 7), (0.5, 50), (1, 100), (1.5, 150), (0.0, 1), (0.001, 1)])
def test_parts_of_an_epoch_round_up_without_float_noise(epochs: float, steps: int) -> None:
    assert Plan.from_lengths([ROW] * 100, ROW, rows_per_step=1).steps(epochs) == steps


def test_progress_of_counting_ends_with_all_windows() -> None:
    told: list[tuple[int, int]] = []
    plan = Plan.from_lengths([5] * 100, ROW, rows_per_step=1)
    plan.steps(2, lambda done, of: told.append((done, of)))
    assert told == [(n + 1, 12) for n in range(12)]


def test_epochs_and_seeds_shuffle_differently() -> None:
    plan = Plan.from_lengths(list(range(1, 31)), ROW, rows_per_step=2)
    orders = [plan.epoch(0), plan.epoch(1), replace(plan, seed=1).epoch(0)]
    assert all(a != b for a, b in zip(orders, orders[1:] + orders[:1], strict=True))


@given(PLANS)
@settings(deadline=None)
def test_a_changed_copy_remembers_nothing_of_the_first(plan: Plan) -> None:
    plan.rows(9)
    copy = replace(plan, seed=plan.seed + 1)
    assert copy.rows(9) == fresh(copy).rows(9)


BASE = make_columns([(0, [(3, 0), (4, 1)]), (1, [(5, 0)]), (1, [(6, 2)])])


@pytest.mark.parametrize(
    "change",
    [
        {"columns": replace(BASE, length=BASE.length[::-1])},
        {"columns": replace(BASE, images=BASE.images + 1)},
        {"columns": replace(BASE, source=np.zeros_like(BASE.source))},
        {"columns": replace(BASE, group=np.arange(4))},
        {"columns": replace(BASE, weight=np.array([1, 2, 1, 1], dtype=np.float32))},
        {"columns": Columns.from_lengths([3, 4, 5, 6, 1])},
        {"mixture": MixtureConfig(temperature=2)},
        {"mixture": MixtureConfig([SourceShare(), SourceShare(repeat=2)])},
        {"seq_length": 33},
        {"rows_per_step": 3},
        {"seed": 1},
        {"packing": False},
    ],
)
def test_fingerprint_changes_when_anything_changes(change: dict[str, Any]) -> None:
    plan = Plan(BASE, MixtureConfig(), ROW, rows_per_step=2)
    assert plan.fingerprint() == fresh(plan).fingerprint()
    assert plan.fingerprint() != replace(plan, **change).fingerprint()


@given(PLANS, st.integers(0, 5))
@settings(deadline=None)
def test_counts_are_those_of_the_rows(plan: Plan, step: int) -> None:
    rows, counts = plan.rows(step), plan.counts(step)
    assert counts["samples"] == sum(len(row) for row in rows)
    assert counts["tokens"] == sum(plan.columns.length[sample] for row in rows for sample in row)
    assert 0 < counts["fill"] <= 1
    assert 0 < plan.fill() <= 1


def test_a_plan_travels_to_workers_that_are_spawned() -> None:
    plan = Plan.from_lengths([5, 6, 7] * 9, ROW, rows_per_step=2, seed=3)
    plan.rows(40)
    travelled = pickle.loads(pickle.dumps(plan))
    assert [travelled.rows(step) for step in range(9)] == [plan.rows(step) for step in range(9)]


def test_few_windows_and_steps_are_remembered() -> None:
    plan = Plan.from_lengths([5] * 100, ROW, rows_per_step=1)
    for step in range(100):
        plan.rows(step)
    assert len(plan._memory.windows) == 2
    assert len(plan._memory.rows) == 4


def test_a_plan_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match=r"no samples to plan: check the files under data\.sources"):
        Plan.from_lengths([], ROW, rows_per_step=1)


def test_a_sample_longer_than_a_row_is_refused_with_the_remedy() -> None:
    with pytest.raises(ValueError, match=r"sample 1 has 33 tokens and fits no row of 32: raise data\.seq_length"):
        Plan.from_lengths([5, 33], ROW, rows_per_step=1)


# ---- positions


@given(PLANS, st.integers(0, 40))
@settings(deadline=None, max_examples=50)
def test_from_any_position_the_same_steps_follow(plan: Plan, step: int) -> None:
    position = json.loads(json.dumps(plan.position(step)))
    resumed = fresh(plan).at(position)
    assert [resumed.rows(s) for s in range(step, step + 5)] == [plan.rows(s) for s in range(step, step + 5)]
    assert resumed.rows(0) == plan.rows(0)  # and what came before is still known, if slowly


@given(PLANS)
@settings(deadline=None)
def test_a_position_carries_the_steps_that_were_counted(plan: Plan) -> None:
    steps = plan.steps(2.5)
    resumed = fresh(plan).at(plan.position(3))
    assert resumed._memory.steps == {"2.5": steps}


def test_a_position_is_less_than_1_kb_late_in_a_long_run() -> None:
    plan = Plan.from_lengths([5] * 400, ROW, rows_per_step=1)
    for epochs in range(20):
        plan.steps(epochs + 1 / 3)
    assert len(json.dumps(plan.position(plan.steps(20)))) < 1024


def test_resume_packs_no_window_but_those_of_its_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = Plan.from_lengths([5] * 400, ROW, rows_per_step=4)
    last = plan.steps(1)
    resumed, expected, packed = fresh(plan).at(plan.position(last - 2)), plan.rows(last - 2), 0

    def counted(*given: Any) -> list[list[int]]:
        nonlocal packed
        packed += 1
        return pack(*given)

    monkeypatch.setattr(windows, "pack", counted)
    assert resumed.rows(last - 2) == expected
    assert packed <= 2  # a step of 4 rows crosses one seam at most


@pytest.mark.parametrize("change", [{"seed": 1}, {"rows_per_step": 3}, {"packing": False}])
def test_the_position_of_another_plan_is_refused(change: dict[str, Any]) -> None:
    plan = Plan(BASE, MixtureConfig(), ROW, rows_per_step=2)
    with pytest.raises(ValueError, match=r"step 1 was written under another plan.*restore those settings"):
        replace(plan, **change).at(plan.position(1))


# ---- mixtures and kinds in the plan


def test_a_repeated_source_comes_as_often_as_it_should() -> None:
    columns = make_columns([(n % 2, [(5, 0)]) for n in range(60)])
    plan = Plan(columns, MixtureConfig([SourceShare(repeat=2.5), SourceShare(repeat=0.5)]), ROW, rows_per_step=2)
    seen = np.bincount([s for epoch in range(2) for row in plan.epoch(epoch) for s in row], minlength=60)
    assert seen[0::2].tolist() == [5] * 30
    assert seen[1::2].tolist() == [1] * 30


def test_windows_of_a_plan_hold_the_shares_of_their_sources() -> None:
    columns = make_columns([(0, [(5, 0)])] * 90 + [(1, [(7, 0)])] * 31 + [(2, [(3, 0)])] * 6)
    plan = Plan(columns, MixtureConfig([SourceShare(weight=w) for w in (1, 2, 3)]), ROW, rows_per_step=2)
    for epoch in range(3):
        for window in range(plan.windows.number(epoch)):
            samples = np.concatenate(plan.windows.rows(epoch, window))
            drawn = np.bincount(columns.source[samples], minlength=3)
            assert (np.abs(drawn - np.array([1, 2, 3]) / 6 * len(samples)) <= 1).all()


def test_a_run_longer_than_max_passes_is_refused_before_it_starts() -> None:
    plan = Plan(BASE, MixtureConfig([SourceShare(max_passes=2)] * 2), ROW, rows_per_step=2)
    assert plan.steps(2) > 0
    with pytest.raises(ValueError, match=r"3 epochs cannot be trained: .* within 2 epochs; raise max_passes, or lower"):
        plan.steps(3)
    with pytest.raises(ValueError, match="step 99 cannot be trained"):
        plan.rows(99)


def test_the_last_step_before_max_passes_is_filled_up() -> None:
    plan = Plan.from_lengths([ROW] * 5, ROW, rows_per_step=2)
    plan = replace(plan, mixture=MixtureConfig([SourceShare(max_passes=1)]))
    assert plan.steps(1) == 3
    rows = [row for step in range(3) for row in plan.rows(step)]
    assert sorted(rows[:5]) == [[n] for n in range(5)]
    assert len(rows) == 6


def test_an_epoch_that_draws_nothing_is_passed_over() -> None:
    plan = replace(Plan.from_lengths([ROW] * 3, ROW, 1), mixture=MixtureConfig([SourceShare(repeat=0.1)]))
    assert [plan.windows.number(epoch) for epoch in range(8)] == [0, 0, 0, 1, 0, 0, 1, 0]
    assert len({tuple(plan.rows(step)[0]) for step in range(3)}) == 3
    assert plan.steps(7) == 2


def kinds_drawn(plan: Plan, epochs: int) -> np.ndarray:
    """For each epoch and record, which of the kinds was used; [epochs, records]."""
    first = np.flatnonzero(np.diff(plan.columns.group, prepend=-1))
    drawn = np.array([np.sort([s for row in plan.epoch(epoch) for s in row]) for epoch in range(epochs)])
    return drawn - first


def test_kinds_are_drawn_by_their_weights_and_anew_each_epoch() -> None:
    records, weights = 3000, np.array([1, 2, 0, 1], dtype=np.float32)
    columns = make_columns([(0, [(5, 0)] * 4)] * records)
    plan = Plan(replace(columns, weight=np.tile(weights, records)), MixtureConfig(), 256, rows_per_step=8, seed=2)
    drawn = kinds_drawn(plan, 4)
    seen, wanted = np.bincount(drawn.ravel(), minlength=4), weights / weights.sum() * drawn.size
    assert seen[2] == 0
    assert ((seen - wanted)[wanted > 0] ** 2 / wanted[wanted > 0]).sum() < 13.8  # chi-square, 2 degrees, 0.1 %
    same = (drawn[0] == drawn[1]).mean()  # independent draws agree in sum of squared shares: 3/8
    assert abs(same - 0.375) < 0.04


def test_kinds_depend_on_neither_order_nor_packing_nor_mixture() -> None:
    columns = make_columns([(n % 2, [(3, 0), (4, 0), (5, 1)]) for n in range(200)])
    plan = Plan(columns, MixtureConfig(), ROW, rows_per_step=2, seed=7)
    even = MixtureConfig(temperature=9)
    for other in (replace(plan, packing=False), replace(plan, seq_length=99), replace(plan, mixture=even)):
        assert (kinds_drawn(other, 2) == kinds_drawn(plan, 2)).all()
    assert (kinds_drawn(replace(plan, seed=8), 2) != kinds_drawn(plan, 2)).any()


def test_a_record_whose_kinds_all_weigh_nothing_is_refused() -> None:
    columns = replace(BASE, weight=np.array([0, 0, 1, 1], dtype=np.float32))
    with pytest.raises(ValueError, match=r"record 0 .* weight is 0: give one of them a weight in `text\.weights`"):
        Plan(columns, MixtureConfig(), ROW, rows_per_step=2)
