"""Pairs of 64-bit numbers that differ in few bits, without comparing all with all.

Enters: two columns of numbers and a distance d. Leaves: the pairs within d. The bits are cut into d + k blocks: of two
numbers within d at least k blocks are equal. So whoever sorts by each choice of k blocks finds every pair among
neighbours (G. Manku and others, "Detecting near-duplicates for web crawling", 2007); k is chosen by the numbers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import combinations

import numpy as np

Numbers = np.ndarray
BITS = 64
AT_ONCE = 2**22
"""Candidates held at a time: about 100 MB."""
MOST_TABLES = 200
SORTING = 40
"""Candidates that can be compared in the time that sorting takes for each number."""


def near_pairs(left: Numbers, right: Numbers, distance: int) -> Iterator[tuple[Numbers, Numbers]]:
    """Yield (places in `left`, places in `right`) of numbers at most `distance` bits apart; a pair may come again."""
    if not len(left) or not len(right):
        return
    for mask in masks(distance, len(left), len(right)):
        for some, others in equal_pairs(left & mask, right & mask):
            near = np.bitwise_count(left[some] ^ right[others]) <= distance
            yield some[near], others[near]


def masks(distance: int, left: int, right: int) -> list[np.uint64]:
    """One mask a table. More agreeing blocks make more tables, each with fewer candidates."""
    costs = {}
    for agreeing in range(BITS - distance + 1):
        tables = math.comb(distance + agreeing, agreeing)
        if tables > MOST_TABLES:
            break
        kept = BITS * agreeing / (distance + agreeing) if agreeing else 0
        costs[agreeing] = tables * (SORTING * (left + right) + left * right / 2**kept)
    agreeing = min(costs, key=lambda agreeing: costs[agreeing])
    blocks = distance + agreeing
    if not agreeing:
        return [np.uint64(0)]
    edges = [BITS * at // blocks for at in range(blocks + 1)]
    parts = [(1 << edges[at + 1]) - (1 << edges[at]) for at in range(blocks)]
    return [np.uint64(sum(chosen)) for chosen in combinations(parts, agreeing)]


def equal_pairs(left: Numbers, right: Numbers) -> Iterator[tuple[Numbers, Numbers]]:
    """Yield the places of all pairs of equal numbers, so many at a time that they fit in memory."""
    order = np.argsort(right, kind="stable")
    ordered = right[order]
    first, end = np.searchsorted(ordered, left, "left"), np.searchsorted(ordered, left, "right")
    found = np.flatnonzero(end > first)
    counts = (end - first)[found]
    reach = np.cumsum(counts)
    start = 0
    while start < len(found):
        before = reach[start - 1] if start else 0
        stop = max(start + 1, int(np.searchsorted(reach, before + AT_ONCE, "right")))
        some = np.repeat(found[start:stop], counts[start:stop])
        within = np.arange(len(some)) - np.repeat(reach[start:stop] - counts[start:stop] - before, counts[start:stop])
        yield some, order[first[some] + within]
        start = stop
