"""The loss, as a sum over supervised positions and their count.

Enters: a micro-batch. Leaves: the summed cross-entropy and the number of supervised tokens; whoever asked divides by
the count of the whole global batch. Logits are computed at supervised positions only: a tensor of all positions
times the vocabulary never exists.

B rows, S tokens of a row, D width of the LLM, K supervised positions of the micro-batch.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from mllm.models.multimodal import MultimodalLM
from mllm.types import IGNORE_INDEX, Batch


class NextToken(nn.Module):
    """Model and loss as one module, so that what wraps it (DDP, ZeRO) sees every use of a weight."""

    def __init__(self, model: MultimodalLM) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, input_ids: Tensor, labels: Tensor, position_ids: Tensor, pixel_values: Tensor, num_images: int
    ) -> Tensor:
        """Summed loss over the K supervised tokens, a float32 scalar; 0 with a gradient of 0 where K is 0."""
        hidden_states = self.model(input_ids, position_ids, pixel_values, num_images)  # [B, S, D]
        where, targets = supervised(labels)
        logits = self.model.logits(hidden_states[:, :-1][where])  # [K, vocabulary]
        return cross_entropy(logits.float(), targets, reduction="sum")


def supervised(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Positions that predict something [B, S-1] bool, and what they predict [K]: here labels are shifted, nowhere
    else."""
    following = labels[:, 1:]
    where = following != IGNORE_INDEX
    return where, following[where]


def num_supervised(batch: Batch) -> int:
    """K: tokens of a micro-batch that carry a loss."""
    return int((batch["labels"][:, 1:] != IGNORE_INDEX).sum())


def model_inputs(batch: Batch, device: torch.device) -> dict[str, Tensor | int]:
    """What `NextToken.forward` takes of a batch, on the device."""
    tensors = {
        name: batch[name].to(device, non_blocking=True)  # type: ignore[literal-required]
        for name in ("input_ids", "labels", "position_ids", "pixel_values")
    }
    return {**tensors, "num_images": batch["num_images"]}
