"""The loss, as a weighted sum over supervised positions and the sum of the weights.

Enters: a micro-batch. Leaves: the summed cross-entropy and the sum of its weights; whoever asked divides by the
weights of the whole global batch. Logits are computed at supervised positions only: a tensor of all positions times
the vocabulary never exists.

B rows, S tokens of a row, D width of the LLM, K supervised positions of the micro-batch.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from mllm.models.multimodal import MultimodalLM
from mllm.train.head_loss import head_loss
from mllm.types import IGNORE_INDEX, Batch

Reduction = Literal["token", "sample", "sqrt"]
"""What counts alike: every supervised token (`token`), every sample whatever its length (`sample`), or the middle of
the two (`sqrt`: a sample of n supervised tokens counts sqrt(n); InternVL 2.5, arXiv 2412.05271)."""
POWER: dict[Reduction, float] = {"token": 0.0, "sample": -1.0, "sqrt": -0.5}
"""A token of a sample of n supervised ones weighs n to this power."""


class NextToken(nn.Module):
    """Model and loss as one module, so that what wraps it (DDP, ZeRO) sees every use of a weight."""

    joint = False
    """Is the loss of a row a matter of the other rows, so that halves of a micro-batch would have another one?"""

    def __init__(self, model: MultimodalLM) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor,
        position_ids: Tensor,
        pixel_values: Tensor,
        num_images: int,
        reduction: Reduction = "token",
        each: bool = False,
        instruction_ids: Tensor | None = None,
        chosen: Supervision | None = None,
        upstream: float = 1.0,
        **known: Any,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Weighted sum of the loss over the K supervised tokens, a float32 scalar; 0 with a gradient of 0 where K is
        0. With `each` also the loss of each supervised token [K] float32, unweighted and without a gradient.
        What is `known` of a micro-batch before it is computed spares its device a wait (`inputs.py`); `upstream` is
        the gradient that the sum will be given, if that is known by now (`head_loss.py`)."""
        hidden_states = self.model(input_ids, position_ids, pixel_values, num_images, instruction_ids, **known)
        at, targets, weight = chosen or supervision(labels, position_ids, reduction)
        states = hidden_states.flatten(0, 1).index_select(0, at)  # [K, D]
        summed, losses = head_loss(self.model, states, targets, weight, upstream)
        return (summed, losses) if each else summed


class Supervision(NamedTuple):
    """The supervised positions of a micro-batch."""

    at: Tensor
    """[K] int64: the positions that predict, counted through all rows."""
    targets: Tensor
    """[K] int64: what they predict."""
    weights: Tensor
    """[K] float32: what each counts."""


def supervision(labels: Tensor, position_ids: Tensor, reduction: Reduction) -> Supervision:
    """Of labels that nobody has shifted."""
    where, targets = supervised(labels)
    at = pad(where, (0, 1)).flatten().nonzero().flatten()
    return Supervision(at, targets, weights(labels, position_ids, reduction))


def supervised(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Positions that predict something [B, S-1] bool, and what they predict [K]: here labels are shifted, nowhere
    else."""
    following = labels[:, 1:]
    where = following != IGNORE_INDEX
    return where, following[where]


def weights(labels: Tensor, position_ids: Tensor, reduction: Reduction) -> Tensor:
    """What each supervised position counts [K] float32. A sample is never cut into two rows, so that a micro-batch
    knows how many supervised tokens each of its samples has; a position of 0 is where the next one begins."""
    sample = (position_ids == 0).flatten().cumsum(0).view_as(position_ids)[:, 1:]  # [B, S-1]
    own = sample[labels[:, 1:] != IGNORE_INDEX]  # [K]
    return own.bincount()[own].float() ** POWER[reduction]  # [K]


def owners(batch: Batch) -> Tensor:
    """Of each supervised token [K] int64 the sample it belongs to, as its place in the batch's samples, row after row.

    Padding, whose tokens count as samples of their own behind the real ones, is never supervised.
    """
    in_row = (batch["position_ids"] == 0).cumsum(1) - 1  # [B, S]
    before = torch.tensor([0, *map(len, batch["sample_ids"][:-1])]).cumsum(0)  # [B]
    return (in_row + before[:, None])[:, 1:][batch["labels"][:, 1:] != IGNORE_INDEX]


def weight_sum(batch: Batch, reduction: Reduction) -> float:
    """What the loss of a micro-batch is worth in the global one: for `token` the number K, for `sample` the samples."""
    return float(weights(batch["labels"], batch["position_ids"], reduction).double().sum())


def num_supervised(batch: Batch) -> int:
    """K: tokens of a micro-batch that carry a loss."""
    return int((batch["labels"][:, 1:] != IGNORE_INDEX).sum())


def model_inputs(batch: Batch, device: torch.device) -> dict[str, Any]:
    """What `NextToken.forward` takes of a batch, on the device; sizes stay numbers, which nobody waits for."""
    tensors: dict[str, Any] = {
        name: batch[name].to(device, non_blocking=True)  # type: ignore[literal-required]
        for name in ("input_ids", "labels", "position_ids", "pixel_values")
    }
    if (words := batch["instruction_ids"]) is not None:
        tensors["instruction_ids"] = words.to(device, non_blocking=True)
    if sizes := [size for row in batch["image_sizes"] for size in row]:
        tensors["image_sizes"] = sizes
    return {**tensors, "num_images": batch["num_images"]}
