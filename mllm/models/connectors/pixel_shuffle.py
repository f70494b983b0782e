"""Neighbouring patches side by side, then linear layers: fewer visual tokens, each of them wider (InternVL, AyaVision).

Enters: patch features [N, P, Dv] of a square grid. Leaves: visual tokens [N, P / factor^2, D]: each block of
factor x factor patches becomes one token that holds all of their features, so that nothing is averaged away.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import isqrt
from typing import Literal

from torch import Tensor, nn
from torch.nn.functional import silu

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
    norm: bool = False
    """A LayerNorm over the joined patches first, as InternVL and AyaVision have it."""
    activation: Literal["gelu", "swiglu"] = "gelu"
    """What stands between the linear layers; `swiglu`, between two, is AyaVision's and Cohere2Vision's."""

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
        first: list[nn.Module] = [nn.LayerNorm(joined)] if self.norm else []
        return nn.Sequential(Shuffle(self.factor), *first, *self.layers(joined, llm_width))

    def layers(self, joined: int, llm_width: int) -> list[nn.Module]:
        """[.., joined] -> [.., llm_width]."""
        if self.activation == "gelu":
            return linear_layers(joined, llm_width, self.depth)
        if self.depth != 2:
            raise ValueError(f"a pixel_shuffle connector of depth {self.depth} with swiglu: it has two linear layers")
        return [nn.Linear(joined, 2 * llm_width), SwiGLU(), nn.Linear(llm_width, llm_width)]


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


class SwiGLU(nn.Module):
    """[.., 2 * D] -> [.., D]: the first half, each number times SiLU of its gate in the second (arXiv 2002.05202)."""

    def forward(self, features: Tensor) -> Tensor:
        value, gate = features.chunk(2, dim=-1)
        return silu(gate) * value
