"""The plan at the size of real sets, in windows as large as they are: the same rows for ever, in seconds."""

from __future__ import annotations

import hashlib
import json
import time
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest

from mllm.data.plan import Plan
from mllm.data.planning import order
from mllm.data.planning.columns import Columns
from mllm.data.planning.mixture import MixtureConfig, SourceShare

MILLION = 1_000_000


def spread(number: int, seed: int = 0) -> Columns:
    """Samples like those of instruction data, nearly all with an image."""
    rng = np.random.default_rng(seed)
    images = (rng.random(number) < 0.94).astype(np.int32) * rng.integers(1, 4, number, dtype=np.int32)
    text = np.clip(np.rint(rng.lognormal(5.2, 0.8, number)), 16, 2048).astype(np.int32)
    return replace(Columns.from_lengths((256 * images + text).tolist()), images=images)


def test_rows_do_not_change_from_version_to_version() -> None:
    columns = spread_by_hash(40_000)
    plan = Plan(columns, MixtureConfig([SourceShare(weight=w) for w in (1, 2, 3)], temperature=1.5), 4096, 24, seed=5)
    rows = json.dumps([plan.rows(step) for step in (0, 1, 300, 301)])
    digest = hashlib.sha256(rows.encode()).hexdigest()[:16]
    assert digest == "985bb9bd8ae6e97d", "raise plan.VERSION: positions in old checkpoints mean other rows"


def spread_by_hash(number: int) -> Columns:
    """Three sources, records of one to four kinds, lengths and images: made of nothing that a release may change."""
    bits = order.scramble(1, np.arange(number))
    images, text = (bits % np.uint64(4)).astype(np.int32), (bits >> np.uint64(8)) % np.uint64(900)
    source = (np.arange(number) * 3 // number).astype(np.int16)
    group = np.cumsum((bits >> np.uint64(30)) % np.uint64(3) > 0) + 10 * source
    return Columns(images * 256 + 8 + text.astype(np.int32), images, source, group, 1 + images.astype(np.float32))


def rank_costs(plan: Plan, rows: list[list[int]], ranks: int) -> float:
    """The slowest rank's cost over the mean, averaged over the groups of rows that ranks work on at the same time."""
    cost = plan._costs(rows)
    together = cost[: len(cost) // ranks * ranks].reshape(-1, ranks)
    return float((together.max(1) / together.mean(1)).mean())


@pytest.mark.parametrize(("rows_per_step", "ranks"), [(8, 8), (64, 8), (64, 2)])
def test_ranks_that_work_together_hold_rows_of_like_cost(rows_per_step: int, ranks: int) -> None:
    plan = Plan(spread(40_000), MixtureConfig(), 4096, rows_per_step)
    packed = [row for window in range(plan.windows.number(0)) for row in plan.windows.rows(0, window)]
    before, after = (rank_costs(plan, rows, ranks) - 1 for rows in (packed, plan.epoch(0)))
    assert after < before / 3


def test_a_million_samples_are_planned_in_seconds_within_a_quarter_of_a_gib() -> None:
    columns = spread(MILLION)
    start = time.process_time()
    plan = Plan(columns, MixtureConfig(), 4096, rows_per_step=64)
    steps = plan.steps(1)
    assert time.process_time() - start < 20
    resumed, position = replace(plan), plan.position(int(steps * 0.9))
    start = time.process_time()
    resumed.at(position).rows(position["step"])
    assert time.process_time() - start < 1
    tracemalloc.start()
    Plan(columns, MixtureConfig(), 4096, rows_per_step=64).rows(0)
    assert tracemalloc.get_traced_memory()[1] < 2**28
    tracemalloc.stop()


def test_the_time_of_a_step_does_not_grow_with_the_index() -> None:
    small, large = (Plan(spread(n), MixtureConfig(), 4096, rows_per_step=8) for n in (10_000, MILLION))
    seconds = {}
    for plan in (small, large):
        plan.rows(0)
        start = time.process_time()
        for step in range(1, 300):
            plan.rows(step)
        seconds[plan] = time.process_time() - start
    assert seconds[large] < 4 * seconds[small] + 0.05


def test_a_window_comes_from_few_places_on_disk() -> None:
    samples = np.concatenate(Plan(spread(200_000), MixtureConfig(), 4096, 8).windows.rows(0, 3))
    assert len(np.unique(samples // order.BLOCK)) <= 2 * order.TOGETHER + 2
