"""What a step adds up over its micro-batches and over all ranks: the loss, images, and the losses of each source.

Enters: each micro-batch with the losses of its supervised tokens. Leaves: the step's numbers, out of one vector that is
summed over the ranks once. Sums are in float64, so that a million tokens of one source lose nothing.

K supervised tokens of a micro-batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mllm.train.losses import owners
from mllm.types import Batch

if TYPE_CHECKING:
    from accelerate import Accelerator


class Sums:
    """Of one step on this rank; `numbers` makes numbers of those of all ranks."""

    def __init__(self, sources: Sequence[str] = ()) -> None:
        self.sources = sources
        self.loss, self.images = 0.0, 0
        self.by_source = torch.zeros(2, max(1, len(sources)), dtype=torch.float64)
        """Unweighted losses and supervised tokens."""

    def add(self, batch: Batch, loss: Tensor, losses: Tensor) -> None:
        """One micro-batch: its weighted sum, and the loss of each supervised token [K], on the host."""
        self.loss += float(loss.detach())
        self.images += batch["num_images"]
        numbers = [number for row in batch["sources"] for number in row] if self.sources else []
        # without names all tokens are of one source
        of_token = torch.tensor(numbers)[owners(batch)] if numbers else torch.zeros(len(losses), dtype=torch.int64)
        losses, bins = losses.double(), self.by_source.shape[1]
        self.by_source += torch.stack([of_token.bincount(losses, bins), of_token.bincount(None, bins).double()])

    def values(self) -> list[float]:
        """What is summed over the ranks."""
        return [self.loss, self.images, *self.by_source.flatten().tolist()]

    def numbers(self, values: Sequence[float], total: float) -> dict[str, Any]:
        """Of `values` summed over the ranks: the loss per unit of weight (`total` is the weight of the step),
        supervised tokens, images, and the mean loss per supervised token of each source that the step has tokens of."""
        loss, images, *by_source = values
        losses, tokens = by_source[: len(by_source) // 2], by_source[len(by_source) // 2 :]
        numbers = {"loss": loss / total, "supervised_tokens": int(sum(tokens)), "images": int(images)}
        if not self.sources:
            return numbers
        found = zip(self.sources, losses, tokens, strict=True)
        return {**numbers, "source_loss": {name: each / count for name, each, count in found if count}}


def global_sums(accelerator: Accelerator, values: Sequence[float]) -> list[float]:
    """The sum of each number over all ranks, in one message; one rank alone asks no device."""
    if accelerator.num_processes == 1:
        return list(values)
    dtype = torch.float32 if accelerator.device.type == "mps" else torch.float64  # Apple's GPU has no float64
    summed: Tensor = accelerator.reduce(torch.tensor(values, dtype=dtype, device=accelerator.device), "sum")
    return summed.tolist()
