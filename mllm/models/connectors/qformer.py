"""BLIP-2's Q-Former: learned queries look at the patches through cross-attention; each query becomes one visual
token.

Enters: patch features [N, P, Dv]. Leaves: visual tokens [N, num_queries, D], however many patches there are.

The blocks are transformers' own. Around them, as in BLIP-2 (Li et al. 2023, section 3.1 and its released code): a
LayerNorm on the frozen encoder's features, queries drawn from N(0, 0.02), cross-attention in every second block, and
a linear layer to the LLM's width. One difference: no dropout by default (BLIP-2: 0.1), so that a step is a function
of its batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from mllm.models.connectors.connector import Connector


@dataclass
class QFormerConnector(Connector):
    """Learned queries with cross-attention; the defaults are BLIP-2's sizes."""

    type: Literal["qformer"] = "qformer"
    num_queries: int = 32
    """V: visual tokens an image becomes."""
    hidden_size: int = 768
    num_layers: int = 12
    num_heads: int = 12
    cross_attention_every: int = 2
    """Blocks 0, this, twice this, ... look at the image."""
    dropout: float = 0.0

    def num_tokens(self, num_patches: int) -> int:
        return self.num_queries

    def build(self, encoder_width: int, llm_width: int, num_patches: int) -> nn.Module:
        return QFormer(self, encoder_width, llm_width)


class QFormer(nn.Module):
    """The module that `QFormerConnector` builds."""

    def __init__(self, config: QFormerConnector, encoder_width: int, llm_width: int) -> None:
        from transformers import Blip2QFormerConfig, Blip2QFormerModel

        super().__init__()
        self.feature_norm = nn.LayerNorm(encoder_width)
        self.queries = nn.Parameter(torch.empty(1, config.num_queries, config.hidden_size).normal_(std=0.02))
        self.blocks = Blip2QFormerModel(
            Blip2QFormerConfig(
                hidden_size=config.hidden_size,
                intermediate_size=4 * config.hidden_size,
                num_hidden_layers=config.num_layers,
                num_attention_heads=config.num_heads,
                cross_attention_frequency=config.cross_attention_every,
                encoder_hidden_size=encoder_width,
                hidden_dropout_prob=config.dropout,
                attention_probs_dropout_prob=config.dropout,
            )
        )
        self.to_llm = nn.Linear(config.hidden_size, llm_width)

    def forward(self, features: Tensor) -> Tensor:
        """[N, P, Dv] -> [N, num_queries, D]."""
        queries = self.queries.expand(len(features), -1, -1)  # [N, num_queries, hidden_size]
        blocks = self.blocks(query_embeds=queries, encoder_hidden_states=self.feature_norm(features))
        return self.to_llm(blocks.last_hidden_state)  # [N, num_queries, D]
