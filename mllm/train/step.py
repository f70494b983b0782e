"""One optimiser step over the micro-batches of this rank.

Enters: the wrapped objective and this rank's block of micro-batches. Leaves: updated weights and the step's numbers.

The weights of all supervised tokens of the global batch are summed first; every micro-batch then contributes its
weighted sum divided by that one number. Splitting the step otherwise (ranks, accumulation, packing) changes nothing but
rounding.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from mllm.train import engine, zero
from mllm.train.losses import Reduction, model_inputs, weight_sum
from mllm.train.sums import Sums
from mllm.types import Batch

if TYPE_CHECKING:
    from accelerate import Accelerator


def optimise(
    accelerator: Accelerator,
    objective: nn.Module,
    optimizer: torch.optim.Optimizer,
    block: list[Batch],
    max_grad_norm: float,
    reduction: Reduction = "token",
    sources: Sequence[str] = (),
) -> dict[str, Any]:
    """Forward, backward, clip, update. `sources` names the sources, by their numbers in the batches.

    Returns:
        what `Sums.over_ranks` tells (loss per unit of weight, supervised tokens, images, the loss of each source), and
        the norm of the gradient before clipping.

    Raises:
        ValueError: from the model, with the samples of the micro-batch named.
    """
    total = global_sum(accelerator, sum(weight_sum(batch, reduction) for batch in block)) or 1.0  # no token, no loss
    # DDP and ZeRO average gradients over ranks: the world size makes a sum of it
    scale = accelerator.num_processes / total
    sums = Sums(sources)
    for i, batch in enumerate(block):
        is_last = i == len(block) - 1
        with nullcontext() if is_last or zero.stage(accelerator) else accelerator.no_sync(objective):
            loss, losses = forward(accelerator, objective, batch, reduction)
            zero.backward(accelerator, loss * scale, is_last)
        sums.add(batch, loss, losses)
    # DeepSpeed has clipped and stepped by now: it tells the norm, and the next two lines do nothing
    grad_norm = engine.clip(accelerator, objective, max_grad_norm or math.inf)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return {**sums.over_ranks(accelerator, total), "grad_norm": grad_norm}


def forward(
    accelerator: Accelerator, objective: nn.Module, batch: Batch, reduction: Reduction
) -> tuple[torch.Tensor, torch.Tensor]:
    """The weighted sum of one micro-batch, and the loss of each of its tokens; an error names whose they are."""
    try:
        return objective(**model_inputs(batch, accelerator.device), reduction=reduction, each=True)
    except ValueError as error:
        raise ValueError(f"{error}. In the micro-batch of {', '.join(batch['where'])}") from error


def global_sum(accelerator: Accelerator, value: float) -> float:
    """The sum of one number over all ranks."""
    return float(accelerator.reduce(torch.tensor(float(value), device=accelerator.device), "sum"))
