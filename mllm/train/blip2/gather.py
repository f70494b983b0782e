"""Rows of all ranks, each rank's with its gradient.

Enters: a tensor of this rank's rows [B, ...]. Leaves: those of all ranks [G, ...], in the order in which one process
would have them: the rows of a step go round the ranks (`data/loader.py`), so that they are dealt back here. Every rank
calls, with as many rows.

B rows of this rank, R ranks, G = B x R.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, distributed


def num_ranks() -> int:
    is_on = distributed.is_available() and distributed.is_initialized()
    return distributed.get_world_size() if is_on else 1


def own_rows(rows: int, device: torch.device) -> Tensor:
    """Where this rank's rows stand among those of all [B] int64."""
    rank = distributed.get_rank() if num_ranks() > 1 else 0
    return torch.arange(rows, device=device) * num_ranks() + rank


def gather(tensor: Tensor) -> Tensor:
    """[B, ...] -> [G, ...]; what other ranks make of this rank's rows comes back in the gradient."""
    return tensor if num_ranks() == 1 else Gather.apply(tensor)  # type: ignore[no-any-return]


class Gather(torch.autograd.Function):
    """See `gather`. The gradient of a row is the sum of those that the losses of all ranks give it."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        parts = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for _ in range(num_ranks())]
        distributed.all_gather(parts, tensor.contiguous())
        return torch.stack(parts, dim=1).flatten(0, 1)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        summed = gradients[0].contiguous().clone()
        distributed.all_reduce(summed)
        return summed[distributed.get_rank() :: num_ranks()]
