"""Linear layers with GELU between them: each patch becomes one visual token (LLaVA-1.5 with depth 2).

Enters: patch features [N, P, Dv]. Leaves: visual tokens [N, P, D]. Every hidden layer is as wide as the LLM, which
is what stock Llava can hold.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import nn

from mllm.models.connectors.connector import Connector


@dataclass
class MLPConnector(Connector):
    """`depth` linear layers, GELU between them."""

    per_patch: ClassVar[bool] = True
    type: Literal["mlp"] = "mlp"
    depth: int = 2
    """Linear layers, at least 2."""
    norm: bool = False
    """A LayerNorm in front, as VipLlava has it over several layers side by side."""

    def build(self, encoder_width: int, llm_width: int, num_patches: int) -> nn.Module:
        if self.depth < 2:
            raise ValueError(f"an mlp connector of depth {self.depth}: use at least 2, or `type: linear`")
        first: list[nn.Module] = [nn.LayerNorm(encoder_width)] if self.norm else []
        return nn.Sequential(*first, *linear_layers(encoder_width, llm_width, self.depth))


def linear_layers(width_in: int, llm_width: int, depth: int) -> list[nn.Module]:
    """`depth` linear layers, the first of them changing the width, with GELU between them."""
    layers: list[nn.Module] = [nn.Linear(width_in, llm_width)]
    for _ in range(depth - 1):
        layers += [nn.GELU(), nn.Linear(llm_width, llm_width)]
    return layers
