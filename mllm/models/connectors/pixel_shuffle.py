"""Neighbouring patches side by side, then linear layers: fewer visual tokens, each of them wider (InternVL, Idefics3).

Enters: patch features [N, P, Dv] of a square grid. Leaves: visual tokens [N, P / factor^2, D]: each block of
factor x factor patches becomes one token that holds all of their features, so that nothing is averaged away.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import isqrt
from typing import Literal

from torch import Tensor, nn

from mllm.models.connectors.connector import Connector
from mllm.models.connectors.mlp import linear_layers


@dataclass
class PixelShuffleConnector(Connector):
    """Blocks of factor x factor patches, joined, then `depth` linear layers with GELU between them."""

    type: Literal["pixel_shuffle"] = "pixel_shuffle"
    factor: int = 2
    """Patches along each side of a block."""
    depth: int = 2
    """Linear layers behind the shuffle; 1 is Idefics3's."""

    def num_tokens(self, num_patches: int) -> int:
        side = isqrt(num_patches)
        if self.factor < 1 or side * side != num_patches or side % self.factor:
            raise ValueError(
                f"a pixel_shuffle connector of factor {self.factor} on {num_patches} patches: "
                f"the side of the grid, {num_patches**0.5:g}, must be a multiple of the factor"
            )
        return num_patches // self.factor**2

    def build(self, encoder_width: int, llm_width: int, num_patches: int) -> nn.Module:
        self.num_tokens(num_patches)
        joined = encoder_width * self.factor**2
        return nn.Sequential(Shuffle(self.factor), *linear_layers(joined, llm_width, self.depth))


class Shuffle(nn.Module):
    """[N, P, Dv] -> [N, P / factor^2, Dv * factor^2], blocks in reading order, patches of a block in reading order."""

    def __init__(self, factor: int) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, features: Tensor) -> Tensor:
        images, patches, width = features.shape
        f, blocks = self.factor, isqrt(patches) // self.factor
        grid = features.reshape(images, blocks, f, blocks, f, width)
        return grid.transpose(2, 3).reshape(images, blocks * blocks, f * f * width)  # [N, V, f * f * Dv]
