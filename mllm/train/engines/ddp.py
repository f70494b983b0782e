"""What DDP does in the last backward pass, after it.

Enters: the objective on every rank, each with gradients of its own. Leaves: on every rank their mean. A rank can leave
an attempt that memory has no room for only as long as no gradients travel; so they do when all ranks are through.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import nn

BUCKET = 25 * 2**20
"""Bytes of gradients that travel together: as many as DDP sends at once."""


def average_gradients(objective: nn.Module) -> None:
    """Gradients become their mean over the ranks."""
    world_size = torch.distributed.get_world_size()
    for bucket in buckets([p for p in objective.parameters() if p.requires_grad]):
        together = torch.cat([p.grad.flatten() for p in bucket if p.grad is not None]).div_(world_size)
        torch.distributed.all_reduce(together)
        for parameter, part in zip(bucket, together.split([p.numel() for p in bucket]), strict=True):
            parameter.grad = part.view_as(parameter)


def buckets(parameters: Sequence[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Parameters whose gradients travel together: of one type, up to a size."""
    bucket: list[nn.Parameter] = []
    size = 0
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        if bucket and (parameter.dtype != bucket[0].dtype or size > BUCKET):
            yield bucket
            bucket, size = [], 0
        bucket.append(parameter)
        size += parameter.numel() * parameter.element_size()
    if bucket:
        yield bucket
