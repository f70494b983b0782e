"""Windows: an epoch cut into pieces that can be planned one by one, in any order.

Enters: columns, mixture, seed. Leaves: the rows of window w of epoch e, a function of (columns, seed, e, w) alone: it
costs the same wherever the window lies and however many samples there are.

A window holds about 8,192 samples: of each source its exact share, rounded up or down (`mixture`), taken from that
source's block shuffle (`order`), one kind of each record (`columns`). They are mixed and packed (`packing`); no row
crosses a window.
"""

from __future__ import annotations

import numpy as np

from mllm.data.packing import pack
from mllm.data.planning import order
from mllm.data.planning.columns import Columns, Records
from mllm.data.planning.mixture import Mixture, MixtureConfig, quotas

WINDOW = 8192
"""Samples of a window, about: enough that its last rows do not matter, few enough to be planned in a blink."""
PASS, KIND, MIX = range(3)  # what a key is for
Rows = list[list[int]]


class Windows:
    """The rows of every window of every epoch."""

    def __init__(self, columns: Columns, mixture: MixtureConfig, seq_length: int | None, seed: int) -> None:
        """Without `seq_length` each row is one sample."""
        self.columns, self.seq_length, self.seed = columns, seq_length, seed
        self.records = Records(columns, len(mixture.shares), order.key_of(seed, KIND))
        self.mixture = Mixture(self.records.sizes, mixture)
        sizes = enumerate(self.records.sizes.tolist())
        self.passes = [order.Passes(count, order.key_of(seed, PASS, source)) for source, count in sizes]
        self._quotas: dict[int, np.ndarray] = {}
        self._kept: tuple[tuple[int, int], tuple[list[int], Rows]] = (-1, -1), ([], [])

    def number(self, epoch: int) -> int:
        """Windows of that epoch; none where it draws nothing."""
        return len(self.quotas(epoch)) - 1

    def after(self, epoch: int, window: int) -> tuple[int, int]:
        """The window after that one. An epoch may be empty, if less than one record is drawn in it."""
        window += 1
        while window >= self.number(epoch):
            epoch, window = epoch + 1, 0
        return epoch, window

    def rows(self, epoch: int, window: int) -> Rows:
        """The rows of one window, as they are packed."""
        samples, groups = self._packed(epoch, window)
        return [[samples[position] for position in group] for group in groups]

    def count(self, epoch: int, window: int) -> int:
        """How many rows `rows` gives."""
        if self.seq_length is None:
            return int((self.quotas(epoch)[window + 1] - self.quotas(epoch)[window]).sum())
        return len(self._packed(epoch, window)[1])

    def _packed(self, epoch: int, window: int) -> tuple[list[int], Rows]:
        """The samples of one window, and their positions in each row. The last is kept: it is counted, then read."""
        if self._kept[0] != (epoch, window):
            samples = self.samples(epoch, window)
            if self.seq_length is None:
                groups = [[position] for position in range(len(samples))]
            else:
                groups = pack(self.columns.length[samples].tolist(), self.seq_length)
            self._kept = (epoch, window), (samples.tolist(), groups)
        return self._kept[1]

    def samples(self, epoch: int, window: int) -> np.ndarray:
        """The samples of one window, in the order in which they are packed."""
        counts, before = self.quotas(epoch), self.mixture.drawn(epoch)
        parts = []
        for source, passes in enumerate(self.passes):
            start, stop = (before[source] + counts[window : window + 2, source]).tolist()
            parts.append(self.records.samples(source, *passes.take(start, stop)))
        samples = np.concatenate(parts)
        return samples[order.shuffled(len(samples), order.key_of(self.seed, MIX, epoch, window))]

    def quotas(self, epoch: int) -> np.ndarray:
        """Records of each source before each window of that epoch; the last two epochs asked for are remembered."""
        if epoch not in self._quotas:
            draws = self.mixture.draws(epoch)
            total = int(draws.sum())
            size = -(-total // max(1, round(total / WINDOW)))
            order.remember(self._quotas, epoch, quotas(draws, max(1, size)))
        return self._quotas[epoch]
