"""The plan: which samples, in which rows, in which step. A pure function of (lengths, seed, step).

Enters: the length of every sample in tokens and a seed. Leaves: for any step, its rows as lists of sample numbers.
Each epoch is one permutation, packed; the rows of all epochs follow each other without a gap, and step s is the s-th
block of `rows_per_step` of them. So a step is the same whoever asks: any rank, any worker, a run that was resumed.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from mllm.data.packing import pack


@dataclass(frozen=True, eq=False)
class Plan:
    """`rows(step)` for a set of samples. Frozen: two plans with equal fields give equal rows."""

    lengths: Sequence[int]
    """Tokens of each sample."""
    seq_length: int
    """Tokens of a row."""
    rows_per_step: int
    """Rows of one optimiser step, over all ranks and accumulation steps."""
    seed: int = 0
    packing: bool = True
    """Without packing each row is one sample."""
    _starts: list[int] = field(default_factory=lambda: [0], init=False, repr=False)
    _packed: dict[int, list[list[int]]] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        if not len(self.lengths):
            raise ValueError("no samples to plan: check the files under data.sources")

    def epoch(self, number: int) -> list[list[int]]:
        """All rows of one epoch: every sample exactly once. The last two asked for are remembered: steps cross
        from one to the next."""
        if number not in self._packed:
            for other in list(self._packed)[:-1]:
                del self._packed[other]
            self._packed[number] = self._pack_epoch(number)
        return self._packed[number]

    def _pack_epoch(self, number: int) -> list[list[int]]:
        order = np.random.default_rng((self.seed, number)).permutation(len(self.lengths)).tolist()
        if not self.packing:
            return [[sample] for sample in order]
        return [[order[p] for p in group] for group in pack([self.lengths[s] for s in order], self.seq_length)]

    def rows(self, step: int) -> list[list[int]]:
        """The rows of one step, across the seam of two epochs where it falls inside."""
        first = step * self.rows_per_step
        return [self.row(number) for number in range(first, first + self.rows_per_step)]

    def row(self, number: int) -> list[int]:
        """The row with that number in the endless sequence of all epochs."""
        while self._starts[-1] <= number:
            self.start(len(self._starts))
        epoch = int(np.searchsorted(self._starts, number, side="right")) - 1
        return self.epoch(epoch)[number - self._starts[epoch]]

    def start(self, epoch: int) -> int:
        """The number of that epoch's first row: all the rows of the epochs before it."""
        while len(self._starts) <= epoch:
            self._starts.append(self._starts[-1] + len(self.epoch(len(self._starts) - 1)))
        return self._starts[epoch]

    def steps(self, epochs: float) -> int:
        """Optimiser steps of so many epochs, rounded up: no sample of them is left out."""
        whole = int(epochs)
        part = (epochs - whole) * len(self.epoch(whole)) if epochs > whole else 0
        rows = self.start(whole) + math.ceil(round(part, 6))  # 0.07 of 100 rows are 7, not 8
        return max(1, -(-rows // self.rows_per_step))

    def counts(self, step: int) -> dict[str, float]:
        """Samples and real tokens of one step over all ranks, and the share of the row space they fill."""
        rows = self.rows(step)
        tokens = sum(self.lengths[sample] for row in rows for sample in row)
        space = len(rows) * (self.seq_length if self.packing else max(self.lengths[row[0]] for row in rows))
        return {"samples": sum(map(len, rows)), "tokens": tokens, "fill": round(tokens / space, 4)}

    def fingerprint(self) -> str:
        """Equal for plans that give the same rows: what a checkpoint's position may be trusted with."""
        facts = (self.seq_length, self.rows_per_step, self.seed, self.packing)
        lengths = np.asarray(self.lengths, dtype=np.int64).tobytes()
        return hashlib.sha256(repr(facts).encode() + lengths).hexdigest()[:16]

    def fill(self) -> float:
        """Share of the first epoch's row space that holds real tokens."""
        rows = self.epoch(0)
        longest = self.seq_length if self.packing else max(self.lengths)
        return sum(self.lengths) / (len(rows) * longest)
