"""Flamingo's Perceiver Resampler: learned queries read the patches, layer after layer; each becomes one visual token.

Enters: patch features [N, P, Dv]. Leaves: visual tokens [N, num_queries, D], however many patches there are.

After Flamingo (arXiv 2204.14198, section 2.1 and figure 5): in each layer the queries attend to the patches and to
themselves at once, then pass a feed-forward of four times their width; LayerNorms in front, no biases in the
attention. 64 queries, 6 layers and 16 heads are Flamingo's. Differences: GELU for its squared ReLU, a width of its own
with a linear layer on either side, no embeddings of time.

N images, P patches, V queries, Dv H D widths of encoder, resampler and LLM.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from mllm.models.connectors.connector import Connector
from mllm.schema import Positive


@dataclass
class ResamplerConnector(Connector):
    """Learned queries that read the patches by cross-attention (Perceiver)."""

    in_rows: ClassVar[bool] = False
    type: Literal["resampler"] = "resampler"
    num_queries: Positive = 64
    """V: visual tokens an image becomes."""
    hidden_size: Positive = 1024
    num_layers: Positive = 6
    num_heads: Positive = 16

    def num_tokens(self, num_patches: int) -> int:
        return self.num_queries

    def build(self, encoder_width: int, llm_width: int, num_patches: int) -> nn.Module:
        if self.hidden_size % self.num_heads:
            raise ValueError(
                f"a resampler connector of hidden_size {self.hidden_size} with {self.num_heads} heads: "
                f"the heads must divide the size"
            )
        return Resampler(self, encoder_width, llm_width)


class Resampler(nn.Module):
    """The module that `ResamplerConnector` builds."""

    def __init__(self, config: ResamplerConnector, encoder_width: int, llm_width: int) -> None:
        super().__init__()
        width = config.hidden_size
        self.from_encoder = nn.Linear(encoder_width, width)
        self.queries = nn.Parameter(torch.empty(1, config.num_queries, width).normal_(std=0.02))
        self.layers = nn.ModuleList([Layer(width, config.num_heads) for _ in range(config.num_layers)])
        self.norm = nn.LayerNorm(width)
        self.to_llm = nn.Linear(width, llm_width)

    def forward(self, features: Tensor) -> Tensor:
        """[N, P, Dv] -> [N, V, D]."""
        features = self.from_encoder(features)  # [N, P, H]
        queries = self.queries.expand(len(features), -1, -1)  # [N, V, H]
        for layer in self.layers:
            queries = layer(queries, features)
        return self.to_llm(self.norm(queries))  # [N, V, D]


class Layer(nn.Module):
    """Queries read patches and each other, then think for themselves."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm_features, self.norm_queries = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query = nn.Linear(width, width, bias=False)
        self.key_value = nn.Linear(width, 2 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.feed_forward = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, queries: Tensor, features: Tensor) -> Tensor:
        """[N, V, H] -> [N, V, H]."""
        asking = self.norm_queries(queries)
        read = torch.cat([self.norm_features(features), asking], dim=1)  # [N, P + V, H]
        query, key, value = (self.heads(part) for part in (self.query(asking), *self.key_value(read).chunk(2, dim=-1)))
        found = scaled_dot_product_attention(query, key, value)  # [N, heads, V, H / heads]
        queries = queries + self.out(found.transpose(1, 2).flatten(2))
        return queries + self.feed_forward(queries)

    def heads(self, tokens: Tensor) -> Tensor:
        """[N, T, H] -> [N, heads, T, H / heads]."""
        return tokens.unflatten(2, (self.num_heads, -1)).transpose(1, 2)
