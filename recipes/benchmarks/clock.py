"""Ways to do the same thing, timed side by side.

Enters: functions that do some samples and say how many. Leaves: CPU seconds a sample, of this process, repeat by
repeat. The ways take turns, in an order that turns round each time, and each is compared with its neighbour in time:
whatever else the machine does meets all of them alike.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Sequence

Way = Callable[[], int]
"""Does its samples and says how many there were."""


def interleaved(ways: dict[str, Way], repeats: int, tick: Callable[[], None] = lambda: None) -> dict[str, list[float]]:
    """CPU seconds a sample of each way, in each repeat; before these, each is done once untimed."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for name in ways:
        ways[name]()
        tick()
    for repeat in range(repeats):
        gc.collect()
        for name in list(ways)[:: -1 if repeat % 2 else 1]:
            start = time.process_time()
            samples = ways[name]()
            seconds[name].append((time.process_time() - start) / samples)
            tick()
    return seconds


def rate(seconds: Sequence[float]) -> float:
    """Samples a CPU second, the median repeat."""
    return 1 / statistics.median(seconds)


def speed(mine: Sequence[float], other: Sequence[float]) -> dict[str, float]:
    """How many times as fast as the other: the median of the repeats, the least and the greatest."""
    ratios = sorted(theirs / ours for ours, theirs in zip(mine, other, strict=True))
    return {"median": statistics.median(ratios), "least": ratios[0], "greatest": ratios[-1]}
