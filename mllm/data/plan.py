"""The plan: which samples, in which rows, in which step. A pure function of (columns, seed, step).

Enters: the columns of an index, the mixture, a seed. Leaves: for any step, its rows as lists of sample numbers, the
same whoever asks: any rank, any worker, a run that was resumed.

The rows of all windows (`windows`) of all epochs follow each other without a gap, and step s is the s-th block of
`rows_per_step` of them. Inside a window, whole steps are sorted by cost and dealt so that ranks are even (`order`);
which rows make whole steps depends on the number of rows before the window. That number is the one thing that is not
known without packing what comes before, so it is counted once, remembered, and written into a checkpoint's position.
"""

from __future__ import annotations

import hashlib
import math
from bisect import bisect_right, insort
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np

from mllm.data.packing import BUFFER, HORIZON
from mllm.data.planning import order
from mllm.data.planning.columns import Columns
from mllm.data.planning.mixture import MixtureConfig
from mllm.data.planning.windows import WINDOW, Rows, Windows

IMAGE_COST = 1000**2
"""An image costs the encoder about what a document of a thousand tokens costs in attention (a 0.4B encoder beside an
LLM of 1.5B; 700 tokens for 7B, 1,500 for 0.5B). Only the order of the costs matters."""
VERSION = 1
"""Of the way from columns to rows; part of the fingerprint."""
SHOWN_WINDOWS = 8
"""Windows of which `fill` is measured."""
KEPT_STEPS = 4
"""Steps that are remembered: a loader asks ahead while the loop counts, and a large step is several windows."""
DEAL = 3  # what a key is for, beside those of `windows`


@dataclass(frozen=True, eq=False)
class Plan:
    """`rows(step)` for the samples of an index. Frozen: two plans with equal fields give equal rows."""

    columns: Columns
    mixture: MixtureConfig
    seq_length: int
    """Tokens of a row."""
    rows_per_step: int
    """Rows of one optimiser step, over all ranks and accumulation steps."""
    seed: int = 0
    packing: bool = True
    """Without packing each row is one sample."""
    windows: Windows = field(init=False, repr=False)
    _memory: Memory = field(init=False, repr=False)

    def __post_init__(self) -> None:
        longest = int(np.argmax(self.columns.length))
        if self.packing and self.columns.length[longest] > self.seq_length:
            raise ValueError(
                f"sample {longest} has {self.columns.length[longest]} tokens and fits no row of {self.seq_length}: "
                f"raise data.seq_length"
            )
        windows = Windows(self.columns, self.mixture, self.seq_length if self.packing else None, self.seed)
        object.__setattr__(self, "windows", windows)
        object.__setattr__(self, "_memory", Memory([(0, *windows.after(0, -1))]))

    @classmethod
    def from_lengths(
        cls, lengths: Sequence[int], seq_length: int, rows_per_step: int, seed: int = 0, packing: bool = True
    ) -> Plan:
        """Samples of one source of which nothing is known but their lengths."""
        return cls(Columns.from_lengths(lengths), MixtureConfig(), seq_length, rows_per_step, seed, packing)

    def rows(self, step: int) -> Rows:
        """The rows of one step, across the seams of windows and epochs where they fall inside.

        Raises:
            ValueError: every source came to its `max_passes` before that step.
        """
        kept = self._memory.rows
        if step not in kept:
            order.remember(kept, step, self._rows(step), most=KEPT_STEPS)
        return kept[step]

    def _rows(self, step: int) -> Rows:
        rows: Rows = []
        first, last = step * self.rows_per_step, (step + 1) * self.rows_per_step
        for start, end, epoch, window in self._walk_to(first):
            if not rows:
                self._check_epochs(epoch + 1, f"step {step}")
            rows += self._dealt(start, epoch, window)[max(0, first - start) : last - start]
            if end >= last:
                break
        return rows

    def epoch(self, number: int) -> Rows:
        """All rows of one epoch, in order: for small sets, since it packs every window of the epoch."""
        windows = self._walk(self._first_row(number), *self.windows.after(number, -1))
        windows = islice(windows, self.windows.number(number))
        return [row for start, _, epoch, window in windows for row in self._dealt(start, epoch, window)]

    def _dealt(self, start: int, epoch: int, window: int) -> Rows:
        """The rows of the window that begins with row `start` of the run, in the order in which steps take them.

        In a set of one window rows stay in their steps: sorted over 16 steps, the same samples would meet each epoch.
        """
        kept = self._memory.windows
        if (epoch, window) not in kept:
            rows = self.windows.rows(epoch, window)
            steps = 1 if self.windows.number(epoch) == 1 else order.STEPS
            key = order.key_of(self.seed, DEAL, epoch, window)
            places = order.dealt(self._costs(rows), start, self.rows_per_step, steps, key)
            order.remember(kept, (epoch, window), [rows[place] for place in places.tolist()])
        return kept[epoch, window]

    def _costs(self, rows: Rows) -> np.ndarray:
        """Of each row, what differs between rows of equal length: attention and images."""
        samples = np.concatenate(rows)
        first = np.cumsum([0, *map(len, rows[:-1])])
        length, images = (column[samples].astype(np.int64) for column in (self.columns.length, self.columns.images))
        return np.add.reduceat(length**2 + IMAGE_COST * images, first)

    def _walk(self, start: int, epoch: int, window: int) -> Iterator[tuple[int, int, int, int]]:
        """(first row, row after the last, epoch, window) from a window on whose first row is known. The length of a
        window that was not walked before is counted, and remembered."""
        starts = self._memory.starts
        while True:
            following = self.windows.after(epoch, window)
            place = bisect_right(starts, start, key=first_row)
            if place == len(starts) or starts[place][1:] != following:
                starts.insert(place, (start + self.windows.count(epoch, window), *following))
            end = starts[place][0]
            yield start, end, epoch, window
            start, (epoch, window) = end, following

    def _walk_to(self, row: int) -> Iterator[tuple[int, int, int, int]]:
        """The walk from the window on that holds a row of the run."""
        starts = self._memory.starts
        known = starts[bisect_right(starts, row, key=first_row) - 1]
        return (window for window in self._walk(*known) if window[1] > row)

    def _first_row(self, epoch: int, progress: Callable[[int], None] | None = None) -> int:
        """The number of that epoch's first row: all the rows of the epochs before it."""
        starts = self._memory.starts
        known = starts[max(0, bisect_right(starts, (epoch, 0), key=lambda start: start[1:]) - 1)]
        for start, _, at, window in self._walk(*known):
            if (at, window) >= (epoch, 0):
                return start
            if progress:
                progress(sum(map(self.windows.number, range(at))) + window + 1)
        raise AssertionError("the walk has no end")

    def num_rows(self, epoch: int) -> int:
        """Rows of that epoch; counted by packing it once."""
        return self._first_row(epoch + 1) - self._first_row(epoch)

    def steps(self, epochs: float, progress: Callable[[int, int], None] | None = None) -> int:
        """Optimiser steps of so many epochs, rounded up: no sample of them is left out.

        All of them are packed once to count their rows: a few seconds a million samples. `progress` is told the
        windows that are done and all that there are.

        Raises:
            ValueError: every source comes to its `max_passes` before.
        """
        known, name = self._memory.steps, str(float(epochs))
        if name not in known:
            whole, end = int(epochs), math.ceil(epochs)
            self._check_epochs(end, f"{epochs:g} epochs")
            windows = sum(map(self.windows.number, range(end)))
            self._first_row(end, (lambda done: progress(done, windows)) if progress else None)
            part = (epochs - whole) * self.num_rows(whole) if epochs > whole else 0
            rows = self._first_row(whole) + math.ceil(round(part, 6))  # 0.07 of 100 rows are 7, not 8
            known[name] = max(1, -(-rows // self.rows_per_step))
        return known[name]

    def _check_epochs(self, epochs: int, wanted: str) -> None:
        exhausted = self.windows.mixture.exhausted
        if epochs > 0 and exhausted(epochs - 1):
            possible = next(epoch for epoch in range(epochs) if exhausted(epoch))
            raise ValueError(
                f"{wanted} cannot be trained: every source comes to its max_passes within {possible} epochs; "
                f"raise max_passes, or lower train.epochs or train.steps"
            )

    def counts(self, step: int) -> dict[str, float]:
        """Samples and real tokens of one step over all ranks, and the share of the row space they fill."""
        rows = self.rows(step)
        tokens = [int(self.columns.length[row].sum()) for row in rows]
        space = len(rows) * (self.seq_length if self.packing else max(tokens))
        return {"samples": sum(map(len, rows)), "tokens": sum(tokens), "fill": round(sum(tokens) / space, 4)}

    def fill(self) -> float:
        """Share of the first epoch's row space that holds real tokens; in large sets, of its first eight windows."""
        epoch, _ = self.windows.after(0, -1)
        windows = range(min(SHOWN_WINDOWS, self.windows.number(epoch)))
        rows = [row for window in windows for row in self.windows.rows(epoch, window)]
        longest = self.seq_length if self.packing else int(self.columns.length.max())
        return int(self.columns.length[np.concatenate(rows)].sum()) / (len(rows) * longest)

    def fingerprint(self) -> str:
        """Equal for plans that give the same rows: what a position may be trusted with."""
        if not self._memory.fingerprint:
            dealing = (order.BLOCK, order.TOGETHER, order.STEPS, order.HANDS, IMAGE_COST)
            rules = (VERSION, WINDOW, BUFFER, HORIZON, dealing)
            facts = (self.mixture, self.seq_length, self.rows_per_step, self.seed, self.packing, rules)
            digest = hashlib.sha256(repr(facts).encode() + self.columns.digest())
            self._memory.fingerprint = digest.hexdigest()[:16]
        return self._memory.fingerprint

    def position(self, step: int) -> dict[str, Any]:
        """What `at` needs to go on with that step at once: JSON values, less than 1 KB."""
        row, _, epoch, window = next(self._walk_to(step * self.rows_per_step))
        steps = dict(list(self._memory.steps.items())[-4:])
        return {"step": step, "epoch": epoch, "window": window, "row": row, "steps": steps, "plan": self.fingerprint()}

    def at(self, position: dict[str, Any]) -> Plan:
        """This plan, which now knows where the window of a position begins: nothing before it is packed again.

        Raises:
            ValueError: the position is another plan's.
        """
        if position["plan"] != self.fingerprint():
            raise ValueError(
                f"the position at step {position['step']} was written under another plan (data, mixture, seq_length, "
                f"rows_per_step, packing or seed): restore those settings, or start anew"
            )
        start = position["row"], position["epoch"], position["window"]
        if start not in self._memory.starts:
            insort(self._memory.starts, start)
        self._memory.steps.update(position["steps"])
        return self


@dataclass
class Memory:
    """What a plan has worked out; forgetting it changes no row."""

    starts: list[tuple[int, int, int]]
    """(first row, epoch, window) of the windows whose first row is known, in order."""
    windows: dict[tuple[int, int], Rows] = field(default_factory=dict)
    """The rows of the last two."""
    rows: dict[int, Rows] = field(default_factory=dict)
    """Of the last steps that were asked for."""
    steps: dict[str, int] = field(default_factory=dict)
    """For each number of epochs that was asked for."""
    fingerprint: str = ""


def first_row(start: tuple[int, int, int]) -> int:
    return start[0]
