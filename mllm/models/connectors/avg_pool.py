"""The mean of neighbouring patches, then linear layers: as many visual tokens as a stage asks for, by the same weights.

Enters: patch features [N, P, Dv] of a square grid. Leaves: visual tokens [N, tokens, D], the grid pooled to one of
sqrt(tokens) on a side. The pooling has no weights, so that a stage may start from one with another number of tokens:
Open-Qwen2VL (arXiv 2504.00595) learns with 144 and is tuned with all 729. The idea is DeCo's (arXiv 2405.20985).
"""

from __future__ import annotations

from dataclasses import dataclass
from math import isqrt
from typing import Literal

from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d

from mllm.models.connectors.connector import Connector
from mllm.models.connectors.grid import check_pooling, from_maps, to_maps
from mllm.models.connectors.mlp import linear_layers
from mllm.schema import Positive


@dataclass
class AvgPoolConnector(Connector):
    """Adaptive average pooling to a smaller grid, then `depth` linear layers with GELU between them."""

    type: Literal["avg_pool"] = "avg_pool"
    tokens: Positive = 144
    """V: visual tokens an image becomes, a square of at most the number of patches."""
    depth: Positive = 2
    """Linear layers behind the pooling."""

    def num_tokens(self, num_patches: int) -> int:
        return check_pooling("avg_pool", self.tokens, num_patches)

    def build(self, encoder_width: int, llm_width: int, num_patches: int) -> nn.Module:
        self.num_tokens(num_patches)
        return AvgPool(Pool(isqrt(self.tokens)), *linear_layers(encoder_width, llm_width, self.depth))


class AvgPool(nn.Sequential):
    """A pooling without weights, and what learns behind it. What is pooled already comes out of the pooling as it went
    in, so that it may be kept in the place of the features (`MultimodalLM.pooled`)."""

    def pooled(self, features: Tensor) -> Tensor:
        """[N, P, Dv] -> [N, tokens, Dv]."""
        return self[0](features)  # type: ignore[no-any-return]

    @property
    def pooling(self) -> str:
        """In words: what of another pooling was kept is another thing."""
        return f"mean, {self[0].side} x {self[0].side}"


class Pool(nn.Module):
    """[N, P, Dv] -> [N, side * side, Dv]: each token the mean of the patches that its cell touches."""

    def __init__(self, side: int) -> None:
        super().__init__()
        self.side = side

    def forward(self, features: Tensor) -> Tensor:
        return from_maps(adaptive_avg_pool2d(to_maps(features), self.side))
