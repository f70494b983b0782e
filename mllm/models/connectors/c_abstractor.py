"""Honeybee's C-Abstractor: convolutions around a pooling, so that a visual token knows its neighbourhood.

Enters: patch features [N, P, Dv] of a square grid. Leaves: visual tokens [N, tokens, D].

After Honeybee (arXiv 2312.06742, section 3.2): learned positions are added, residual blocks look at neighbours, the
grid is pooled, residual blocks look again, linear layers lead to the LLM's width. 144 tokens, 3 blocks on either side,
1024 channels and 2 linear layers are its released settings. A block is RegNet's: 1 x 1, depthwise 3 x 3, squeeze and
excitation (a quarter of the channels), 1 x 1, with LayerNorm over channels and SiLU. Written from that description;
released weights of Honeybee do not load here.

N images, P patches, C channels, Dv D widths of encoder and LLM.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import isqrt
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from mllm.models.connectors.connector import Connector
from mllm.models.connectors.grid import check_pooling, from_maps, to_maps
from mllm.schema import Positive


@dataclass
class CAbstractorConnector(Connector):
    """Residual convolutions, adaptive average pooling, residual convolutions, linear layers."""

    type: Literal["c_abstractor"] = "c_abstractor"
    tokens: Positive = 144
    """V: visual tokens an image becomes, a square of at most the number of patches."""
    hidden_size: Positive = 1024
    """Channels of the convolutions."""
    depth: Positive = 3
    """Residual blocks before the pooling, and again behind it."""
    mlp_depth: Positive = 2
    """Linear layers at the end."""

    def num_tokens(self, num_patches: int) -> int:
        return check_pooling("c_abstractor", self.tokens, num_patches)

    def build(self, encoder_width: int, llm_width: int, num_patches: int) -> nn.Module:
        self.num_tokens(num_patches)
        return CAbstractor(self, encoder_width, llm_width, num_patches)


class CAbstractor(nn.Module):
    """The module that `CAbstractorConnector` builds."""

    def __init__(self, config: CAbstractorConnector, encoder_width: int, llm_width: int, num_patches: int) -> None:
        super().__init__()
        width = config.hidden_size
        self.positions = nn.Parameter(torch.empty(1, num_patches, encoder_width).normal_(std=0.02))
        self.before = blocks(encoder_width, width, config.depth)
        self.pool = nn.AdaptiveAvgPool2d(isqrt(config.tokens))
        self.behind = blocks(width, width, config.depth)
        layers: list[nn.Module] = [nn.Linear(width, llm_width)]
        for _ in range(config.mlp_depth - 1):
            layers += [nn.SiLU(), nn.Linear(llm_width, llm_width)]
        self.to_llm = nn.Sequential(*layers)

    def forward(self, features: Tensor) -> Tensor:
        """[N, P, Dv] -> [N, tokens, D]."""
        maps = to_maps(features + self.positions)  # [N, Dv, side, side]
        maps = self.behind(self.pool(self.before(maps)))  # [N, C, sqrt(tokens), sqrt(tokens)]
        return self.to_llm(from_maps(maps))  # [N, tokens, D]


def blocks(width_in: int, width: int, depth: int) -> nn.Sequential:
    return nn.Sequential(*[Block(width_in if number == 0 else width, width) for number in range(depth)])


class Block(nn.Module):
    """A residual block on maps [N, C, side, side]; a 1 x 1 convolution carries the old maps over to another width."""

    def __init__(self, width_in: int, width: int) -> None:
        super().__init__()
        self.narrow, self.norm_narrow = nn.Conv2d(width_in, width, 1, bias=False), ChannelNorm(width)
        self.look, self.norm_look = nn.Conv2d(width, width, 3, padding=1, groups=width, bias=False), ChannelNorm(width)
        inner = max(1, width // 4)
        self.squeeze, self.excite = nn.Linear(width, inner), nn.Linear(inner, width)
        self.widen, self.norm_widen = nn.Conv2d(width, width, 1, bias=False), ChannelNorm(width)
        self.carry: nn.Module = nn.Identity()
        if width_in != width:
            self.carry = nn.Sequential(nn.Conv2d(width_in, width, 1, bias=False), ChannelNorm(width))

    def forward(self, maps: Tensor) -> Tensor:
        """[N, C, side, side] -> [N, C', side, side]."""
        found = silu(self.norm_narrow(self.narrow(maps)))
        found = silu(self.norm_look(self.look(found)))
        weights = self.excite(silu(self.squeeze(found.mean(dim=(2, 3))))).sigmoid()  # [N, C']
        found = self.norm_widen(self.widen(found * weights[:, :, None, None]))
        return silu(found + self.carry(maps))


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of each place of a map."""

    def forward(self, maps: Tensor) -> Tensor:
        """[N, C, side, side], of the same shape."""
        return super().forward(maps.movedim(1, -1)).movedim(-1, 1)
