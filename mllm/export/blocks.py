"""Connectors that join or pool blocks of patches, as Cohere2Vision and AyaVision see them.

Enters: a connector. Leaves: the size of a block, a norm if there is one, and the layers behind it; or nothing, where
these classes cannot write it so. The mean over a block is one matrix over the joined block, and no block at all is one
of a single patch.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import isqrt
from typing import Any

from torch import nn

from mllm.models.connectors.avg_pool import Pool
from mllm.models.connectors.pixel_shuffle import Shuffle, SwiGLU


@dataclass(frozen=True)
class Blocks:
    """What is done to the patches, in order."""

    factor: int
    """Patches along each side of a block; 1 where nothing is joined."""
    norm: nn.LayerNorm | None
    """Over joined patches."""
    layers: list[Any]
    """[linear] or [linear, gate, linear]."""
    is_pooled: bool = False

    @property
    def is_gated(self) -> bool:
        return len(self.layers) == 3


def find_blocks(connector: nn.Module, num_patches: int) -> Blocks | None:
    """What a connector is for these classes; nothing where it cannot be written so."""
    modules: list[Any] = list(connector) if isinstance(connector, nn.Sequential) else [connector]
    factor, is_pooled = 1, isinstance(modules[0], Pool)
    if isinstance(modules[0], Pool):
        factor, rest = divmod(isqrt(num_patches), modules.pop(0).side)
        if rest:
            return None
    elif isinstance(modules[0], Shuffle):
        factor = modules.pop(0).factor
    norm = modules.pop(0) if isinstance(modules[0], nn.LayerNorm) else None
    if [type(module) for module in modules] not in ([nn.Linear], [nn.Linear, SwiGLU, nn.Linear]):
        return None
    return Blocks(factor, norm, modules, is_pooled)
