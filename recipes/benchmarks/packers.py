"""Two other ways to pack, for comparison alone: lengths to the number of rows that they fill.

First-fit-decreasing over the whole set is what offline packers do (Open-Qwen2VL, NeMo AutoModel): it must see every
length first, and puts long samples before short ones. The balanced knapsack is nanoVLM's: of each window of samples
it sorts the lengths, and gives each to the emptiest of a few rows more than would do. Its limits on images are left
out here, which only helps it.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

SPARE = 5
"""Rows that nanoVLM opens beyond the least number."""
WINDOW_ROWS = 8
"""Rows' worth of tokens in one of its windows: four times its default batch."""


def first_fit_decreasing(lengths: Sequence[int], seq_length: int) -> int:
    """Each length, the longest first, goes to the first row with room: found in a tree of the most room below."""
    leaves = 1 << (len(lengths) - 1).bit_length()
    room = [seq_length] * (2 * leaves)
    used = 0
    for length in sorted(lengths, reverse=True):
        node = 1
        while node < leaves:
            node *= 2
            node += room[node] < length
        used = max(used, node - leaves + 1)
        room[node] -= length
        while node := node // 2:
            room[node] = max(room[2 * node], room[2 * node + 1])
    return used


def balanced_knapsack(lengths: Sequence[int], seq_length: int, window_rows: int = WINDOW_ROWS) -> int:
    """Windows of about `window_rows` rows' worth of tokens, each packed by itself."""
    rows, waiting, tokens = 0, [], 0
    for length in lengths:
        waiting.append(length)
        tokens += length
        if tokens >= window_rows * seq_length:
            rows += knapsacks(waiting, seq_length)
            waiting, tokens = [], 0
    return rows + (knapsacks(waiting, seq_length) if waiting else 0)


def knapsacks(lengths: Sequence[int], seq_length: int) -> int:
    """Rows that are not empty after each length went to the emptiest, or to a new one where it does not fit."""
    loads = [0] * (-(-sum(lengths) // seq_length) + SPARE)
    for length in sorted(lengths, reverse=True):
        if loads[0] + length <= seq_length:
            heapq.heapreplace(loads, loads[0] + length)
        else:
            heapq.heappush(loads, length)
    return sum(load > 0 for load in loads)
