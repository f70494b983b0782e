"""How long a step took, how much of that was waiting for data, and what memory the run has come to.

Enters: this rank's micro-batches. Leaves: numbers for the line of a step. They differ from run to run: `MEASURED` names
them, so that two runs can be compared without them.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from typing import Any

import torch

from mllm.types import Batch

MEASURED = ("seconds", "tokens_per_second", "data_wait", "peak_memory")
"""Fields of a line that no two runs share."""


class Clock:
    """One step at a time: `block` begins it, `lap` ends it. What happens between two steps (a checkpoint, held-out
    losses) is not part of either."""

    def __init__(self) -> None:
        self.began = self.waited = 0.0

    def block(self, micro_batches: Iterator[Batch], number: int) -> list[Batch]:
        """The next micro-batches of this rank; waiting for them is timed."""
        self.began = time.perf_counter()
        block = [next(micro_batches) for _ in range(number)]
        self.waited = time.perf_counter() - self.began
        return block

    def lap(self, tokens: float) -> dict[str, Any]:
        """`tokens_per_second` over all ranks; `data_wait`, this rank's share of the step; `peak_memory` of this rank.
        `tokens` are the real ones of the step, over all ranks."""
        seconds = max(1e-9, time.perf_counter() - self.began)
        return {
            "tokens_per_second": round(tokens / seconds, 1),
            "data_wait": round(self.waited / seconds, 4),
            "peak_memory": peak_memory(),
        }


def peak_memory() -> int:
    """Bytes at the highest so far: of tensors on the CUDA device, or else resident bytes of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    import resource

    highest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return highest if sys.platform == "darwin" else highest * 1024  # macOS counts bytes, Linux KiB
