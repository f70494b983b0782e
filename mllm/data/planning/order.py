"""Order: a shuffle that is known at any place without being written down, and rows dealt so that ranks are even.

Enters: numbers. Leaves: `Passes.take`, the records at some places of a source's endless sequence of passes, and
`dealt`, the order of a window's rows. All randomness of the plan is `scramble`, a hash of (key, number): it has no
state, so any place can be asked for first, and it is the same in every process and under every version of NumPy.

A pass is a block shuffle. Blocks of consecutive records, which lie near each other on disk, are permuted; then the
records of a few blocks that have come to stand side by side are shuffled together. So a place costs the shuffle of
one such group, however many records there are, and reading touches few files at a time.
"""

from __future__ import annotations

from hashlib import blake2b
from typing import Any

import numpy as np

BLOCK = 1024
"""Consecutive records that stay near each other."""
TOGETHER = 16
"""Blocks that are shuffled together: neighbours in training come from as many places of the source."""
STEPS = 16
"""Steps whose rows are sorted by cost together. The slowest of 8 ranks is then 0.2 to 0.5 % above the mean, where it
was 0.7 to 2.8 % (simulated: instruction data, native resolution, tiles)."""
HANDS = 4
"""Hands of rows in a step, where it has rows enough for hands of 8."""


def scramble(key: int, numbers: np.ndarray) -> np.ndarray:
    """64 well-mixed bits a number: the generator SplitMix64 (Steele et al., 2014), asked at those places."""
    z = numbers.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(key)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def key_of(*facts: int) -> int:
    """One key of 64 bits for several integers."""
    return int.from_bytes(blake2b(repr([int(fact) for fact in facts]).encode(), digest_size=8).digest(), "little")


def shuffled(count: int, key: int) -> np.ndarray:
    """A permutation of 0..count-1."""
    return np.argsort(scramble(key, np.arange(count)), kind="stable")


class Passes:
    """The endless sequence of a source's records: each pass is a permutation of all of them, each another one."""

    def __init__(self, count: int, key: int) -> None:
        self.count, self.key = count, key
        self._kept: tuple[tuple[int, int], np.ndarray] | None = None

    def take(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """The records at those places, and the pass in which each stands."""
        records, numbers = [np.empty(0, dtype=np.int64)], [np.empty(0, dtype=np.int64)]
        while start < stop:
            number, place = divmod(start, self.count)
            part, offset = self._part(number, place)
            part = part[offset : offset + stop - start]
            records.append(part)
            numbers.append(np.full(len(part), number))
            start += len(part)
        return np.concatenate(records), np.concatenate(numbers)

    def _part(self, number: int, place: int) -> tuple[np.ndarray, int]:
        """The shuffled group of blocks around a place of a pass, and where in it the place is."""
        blocks = -(-self.count // BLOCK)
        order = shuffled(blocks, key_of(self.key, number))
        sizes = np.where(order == blocks - 1, self.count - (blocks - 1) * BLOCK, BLOCK)  # the last block is shorter
        starts = np.concatenate([[0], np.cumsum(sizes)])[::TOGETHER]
        group = int(np.searchsorted(starts, place, side="right")) - 1
        if self._kept is None or self._kept[0] != (number, group):
            members = [
                np.arange(block * BLOCK, min(self.count, (block + 1) * BLOCK))
                for block in order[group * TOGETHER : (group + 1) * TOGETHER].tolist()
            ]
            together = np.concatenate(members)
            self._kept = (number, group), together[shuffled(len(together), key_of(self.key, number, group))]
        return self._kept[1], place - int(starts[group])


def hand_size(rows_per_step: int) -> int:
    """Rows of like cost that stay side by side: a divisor of the step, at least 8 and a quarter of it."""
    least = min(rows_per_step, max(8, rows_per_step // HANDS))
    return next(size for size in range(least, rows_per_step + 1) if rows_per_step % size == 0)


def dealt(cost: np.ndarray, first_row: int, rows_per_step: int, steps: int, key: int) -> np.ndarray:
    """The order of some rows, of which the first is row `first_row` of the run, such that ranks are even.

    The rows of every `steps` steps are sorted by their cost and cut into hands of like rows, and the hands are
    shuffled. Row r of a step belongs to rank r % world size, so the ranks that work at the same time hold rows of one
    hand. A step is several hands, not one run of the sorted rows: it stays a fairer sample of the data. With
    `steps` = 1 no row leaves its step.
    """
    hand, order = hand_size(rows_per_step), np.arange(len(cost))
    if hand == 1:
        return order
    together = rows_per_step * steps
    ends = range(-first_row % rows_per_step or together, len(cost), together)  # the first completes a step
    for start, end in zip([0, *ends], [*ends, len(cost)], strict=True):
        start += -(first_row + start) % hand  # rows that complete an earlier hand, and those at the end that make no
        whole = (end - start) // hand * hand  # whole one, stay where they are
        if whole > hand:
            hands = (start + np.argsort(cost[start : start + whole], kind="stable")).reshape(-1, hand)
            order[start : start + whole] = hands[shuffled(len(hands), key_of(key, start))].ravel()
    return order


def remember(kept: dict[Any, Any], key: Any, value: Any, most: int = 2) -> None:
    """Keep the last two, or more: steps cross from one window or epoch to the next."""
    while len(kept) >= most:
        del kept[next(iter(kept))]
    kept[key] = value
