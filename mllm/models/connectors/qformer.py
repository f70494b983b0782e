"""BLIP-2's Q-Former: learned queries look at the patches through cross-attention; each query becomes one visual
token.

Enters: patch features [N, P, Dv]. Leaves: visual tokens [N, num_queries, D], however many patches there are.

The blocks are transformers' own. Around them, as in BLIP-2 (Li et al. 2023, section 3.1 and its released code): a
LayerNorm on the frozen encoder's features, queries drawn from N(0, 0.02), cross-attention in every second block, and
a linear layer to the LLM's width. One difference: no dropout by default (BLIP-2: 0.1), so that a step is a function
of its batch.

With `instruct`, as in InstructBLIP (Dai et al. 2023, section 2.3), the queries also see the words of the turn in which
the image stands, by self-attention; the words have feed-forwards of their own, and do not look at the image. One
difference: words enter as the LLM's own token embeddings through a linear layer, where InstructBLIP has BERT's, so that
there is one tokenizer. What the assistant says never enters.

N images, P patches, T words, Dv H D widths of encoder, Q-Former and LLM.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from mllm.models.connectors.connector import Connector

LONGEST = 128
"""Words that are read, as in InstructBLIP's released code."""


@dataclass
class QFormerConnector(Connector):
    """Learned queries with cross-attention; the defaults are BLIP-2's sizes."""

    in_rows: ClassVar[bool] = False
    type: Literal["qformer"] = "qformer"
    num_queries: int = 32
    """V: visual tokens an image becomes."""
    hidden_size: int = 768
    num_layers: int = 12
    num_heads: int = 12
    cross_attention_every: int = 2
    """Blocks 0, this, twice this, ... look at the image."""
    dropout: float = 0.0
    instruct: bool = False
    """The queries read the user's words beside the image (InstructBLIP)."""

    def num_tokens(self, num_patches: int) -> int:
        return self.num_queries

    def build(self, encoder_width: int, llm_width: int, num_patches: int) -> nn.Module:
        return (InstructQFormer if self.instruct else QFormer)(self, encoder_width, llm_width)


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
                use_qformer_text_input=config.instruct,
            )
        )
        self.to_llm = nn.Linear(config.hidden_size, llm_width)

    def forward(self, features: Tensor) -> Tensor:
        """[N, P, Dv] -> [N, num_queries, D]."""
        queries = self.queries.expand(len(features), -1, -1)  # [N, num_queries, hidden_size]
        blocks = self.blocks(query_embeds=queries, encoder_hidden_states=self.feature_norm(features))
        return self.to_llm(blocks.last_hidden_state)  # [N, num_queries, D]


class InstructQFormer(QFormer):
    """The same, with words beside the queries."""

    instruct = True
    """Asked by the model, which then looks up the words."""

    def __init__(self, config: QFormerConnector, encoder_width: int, llm_width: int) -> None:
        super().__init__(config, encoder_width, llm_width)
        self.llm_width = llm_width
        self.from_words = nn.Linear(llm_width, config.hidden_size)
        self.positions = nn.Parameter(torch.empty(1, LONGEST, config.hidden_size).normal_(std=0.02))
        last = self.blocks.encoder.layer[-1]  # nobody reads words behind it: their feed-forward would never learn
        last.intermediate, last.output = nn.Identity(), PassOn()

    def forward(self, features: Tensor, words: Tensor | None = None, is_word: Tensor | None = None) -> Tensor:
        """[N, P, Dv], words [N, T, D] with their mask [N, T] -> [N, num_queries, D].

        Without words one that is masked stands in their place, so that every weight is in use in every micro-batch.
        """
        if words is None or is_word is None:
            words = features.new_zeros(len(features), 1, self.llm_width)
            is_word = torch.zeros(len(features), 1, dtype=torch.bool, device=features.device)
        queries = self.queries.expand(len(features), -1, -1)  # [N, num_queries, H]
        said = self.from_words(words) + self.positions[:, : words.shape[1]]  # [N, T, H]
        seen = torch.cat([is_word.new_ones(queries.shape[:2]), is_word], dim=1)[:, None, None]  # [N, 1, 1, queries + T]
        # numbers that are added: of another form transformers would have to look at the values
        mask = torch.zeros_like(seen, dtype=said.dtype).masked_fill(~seen, torch.finfo(said.dtype).min)
        blocks = self.blocks(
            query_embeds=torch.cat([queries, said], dim=1),
            query_length=queries.shape[1],
            attention_mask=mask,
            encoder_hidden_states=self.feature_norm(features),
        )
        return self.to_llm(blocks.last_hidden_state[:, : queries.shape[1]])  # [N, num_queries, D]


class PassOn(nn.Module):
    """In the place of a feed-forward with its residual: what came in."""

    def forward(self, _inner: Tensor, came_in: Tensor) -> Tensor:
        return came_in
