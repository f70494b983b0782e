"""Rates are a function of the step alone."""

from __future__ import annotations

import pytest
import torch

from mllm.train.schedule import rate_factor, rates, set_rates


@pytest.mark.parametrize("schedule", ["cosine", "constant"])
@pytest.mark.parametrize("steps", [1, 2, 7, 100])
@pytest.mark.parametrize("warmup", [0.0, 0.03, 0.5, 1.0])
def test_every_step_moves_something_and_none_exceeds_the_peak(schedule, steps, warmup) -> None:
    factors = [rate_factor(step, steps, warmup, schedule) for step in range(steps)]
    assert all(0 < factor <= 1 for factor in factors)


def test_rate_rises_in_the_warmup_and_falls_behind_it() -> None:
    factors = [rate_factor(step, 100, 0.1, "cosine") for step in range(100)]
    assert factors[:11] == sorted(factors[:11])
    assert factors[10] == 1.0
    assert factors[10:] == sorted(factors[10:], reverse=True)
    assert factors[-1] < 0.001


def test_without_warmup_the_first_step_has_the_peak() -> None:
    assert rate_factor(0, 10, 0.0, "cosine") == rate_factor(0, 10, 0.0, "constant") == 1.0


def test_constant_stays_at_the_peak_behind_the_warmup() -> None:
    assert {rate_factor(step, 100, 0.1, "constant") for step in range(10, 100)} == {1.0}


def test_each_part_keeps_its_own_peak() -> None:
    groups = [
        {"params": [torch.zeros(1)], "lr": peak, "peak": peak, "part": part}
        for part, peak in (("connector", 1e-3), ("llm", 2e-5))
    ]
    optimizer = torch.optim.AdamW(groups)
    for _ in range(3):
        set_rates(optimizer, 0.5)
    assert rates(optimizer) == {"learning_rate": {"connector": 5e-4, "llm": 1e-5}}
