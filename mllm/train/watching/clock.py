"""How long a step took, how much of that was waiting for data, how much of what the device can do was used, and what
memory the run has come to.

Enters: this rank's micro-batches. Leaves: numbers for the line of a step. They differ from run to run: `MEASURED` names
them, so that two runs can be compared without them.
"""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Iterator
from typing import Any

import torch

from mllm.models.multimodal import MultimodalLM
from mllm.train.forecasting.flops import Cost, cost_of, step_flops
from mllm.train.forecasting.peaks import peak_flops
from mllm.types import Batch

MEASURED = ("seconds", "tokens_per_second", "data_wait", "mfu", "peak_memory")
"""Fields of a line that no two runs share."""


class Clock:
    """One step at a time: `block` begins it, `lap` ends it. What happens between two steps (a checkpoint, held-out
    losses) is not part of either. `cost` is the model's, `peak` the operations a second that the device could do."""

    def __init__(self, cost: Cost, peak: float) -> None:
        self.cost, self.peak = cost, peak
        self.began = self.waited = self.flops = 0.0

    def block(self, micro_batches: Iterator[Batch], number: int) -> list[Batch]:
        """The next micro-batches of this rank; waiting for them is timed."""
        self.began = time.perf_counter()
        block = [next(micro_batches) for _ in range(number)]
        self.waited = time.perf_counter() - self.began
        self.flops = step_flops(self.cost, block)
        return block

    def lap(self, tokens: float) -> dict[str, Any]:
        """`tokens_per_second` over all ranks; of this rank `data_wait`, the share of the step that it waited, `mfu`,
        the operations that its rows need as a share of what the device could do in that time, and `peak_memory`.
        `tokens` are the real ones of the step, over all ranks."""
        seconds = max(1e-9, time.perf_counter() - self.began)
        return {
            "tokens_per_second": round(tokens / seconds, 1),
            "data_wait": round(self.waited / seconds, 4),
            "mfu": round(self.flops / seconds / self.peak, 4),
            "peak_memory": peak_memory(),
        }


def make_clock(model: MultimodalLM, device: torch.device, is_bf16: bool) -> Clock:
    """The clock of a run; before weights are sharded."""
    return Clock(cost_of(model), peak_of(device, torch.bfloat16 if is_bf16 else model.llm.dtype))


@functools.cache
def peak_of(device: torch.device, dtype: torch.dtype) -> float:
    """Asked once a process, because of a device that no table knows it is measured."""
    return peak_flops(device, dtype)


def peak_memory() -> int:
    """Bytes at the highest so far: of tensors on the CUDA device, or else resident bytes of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    import resource

    highest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return highest if sys.platform == "darwin" else highest * 1024  # macOS counts bytes, Linux KiB
