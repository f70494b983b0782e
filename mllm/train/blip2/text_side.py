"""What a Q-Former needs beside itself to learn from pairs: a text side and three heads.

Enters: the connector. Leaves: the same connector with feed-forwards for words in its blocks and `text_side` beside
them, all of which train, lie in checkpoints and are taken off again at the end of the stage (`take_off`), since what
follows reads the queries alone. Of a connector with `instruct`, which reads words itself, its own text weights are used
and trained: they stay.

Words enter as the frozen LLM's token embeddings through a linear layer, and are predicted by its frozen head behind
another: one tokenizer, and no table of a vocabulary to train. BLIP-2 has BERT's table for both. The LLM itself does not
run.

N rows, T words, H D widths of Q-Former and LLM, E of the contrast.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn

from mllm.models.connectors.qformer import LONGEST, InstructQFormer, PassOn, QFormer

FILE = "qformer_text.safetensors"
"""In the stage folder: all that is taken off."""
WORDS = LONGEST - 1
"""Of a caption; one more place is the start's."""
CONTRAST = 256
"""E."""
TEMPERATURE = 0.07
"""At the start; learned from there on."""
COLDEST = 0.01


class TextSide(nn.Module):
    """The heads, and the way of words in, where the connector has none. `forward` is of words; the rest is read by the
    objective."""

    def __init__(self, hidden: int, llm_width: int, has_words: bool) -> None:
        super().__init__()
        if not has_words:
            self.from_words = nn.Linear(llm_width, hidden)
            self.positions = nn.Parameter(torch.empty(1, LONGEST, hidden).normal_(std=0.02))
        self.starts = nn.Parameter(torch.empty(2, hidden).normal_(std=0.02))
        self.of_query, self.of_text = nn.Linear(hidden, CONTRAST), nn.Linear(hidden, CONTRAST)
        self.log_temperature = nn.Parameter(torch.tensor([math.log(TEMPERATURE)]))
        self.matches = nn.Linear(hidden, 2)
        self.to_words = nn.Linear(hidden, llm_width)

    @property
    def temperature(self) -> Tensor:
        return self.log_temperature.exp().clamp(min=COLDEST)


def attach(connector: QFormer, llm_width: int) -> None:
    """Put the text side on; feed-forwards of words start as copies of the queries'."""
    reads = isinstance(connector, InstructQFormer)
    for layer in connector.blocks.encoder.layer:
        if not has_feed_forward(layer):
            layer.intermediate = copy.deepcopy(layer.intermediate_query)
            layer.output = copy.deepcopy(layer.output_query)
    connector.text_side = TextSide(connector.queries.shape[-1], llm_width, reads)


def has_feed_forward(layer: Any) -> bool:
    return hasattr(layer, "output") and not isinstance(layer.output, PassOn)


def take_off(connector: QFormer) -> dict[str, nn.Parameter]:
    """The connector as it is without this stage; what was on it, by name."""
    before = dict(connector.named_parameters())
    layers, reads = connector.blocks.encoder.layer, isinstance(connector, InstructQFormer)
    del connector.text_side
    if reads:
        layers[-1].intermediate, layers[-1].output = nn.Identity(), PassOn()
    else:
        for layer in layers:
            del layer.intermediate, layer.output
    kept = {name for name, _ in connector.named_parameters()}
    return {name: parameter for name, parameter in before.items() if name not in kept}


def embedded(connector: Any, words: Tensor, start: int) -> Tensor:
    """[N, T, D] -> [N, 1 + T, H]: behind the start for reading (0) or for writing (1)."""
    own = connector if isinstance(connector, InstructQFormer) else connector.text_side
    first = connector.text_side.starts[start].expand(len(words), 1, -1)
    text = torch.cat([first, own.from_words(words)], dim=1)
    return text + own.positions[:, : text.shape[1]]


def through_blocks(connector: Any, text: Tensor, mask: Tensor, features: Tensor | None) -> tuple[Tensor, Tensor]:
    """Text [N, T, H], with queries in front where there are features [N, P, Dv] -> queries [N, Q, H], text [N, T, H].
    `mask` [N, Q + T, Q + T] says who (rows) sees whom (columns)."""
    number, seen = 0, text
    if features is not None:
        number = connector.queries.shape[1]
        seen = torch.cat([connector.queries.expand(len(text), -1, -1), text], dim=1)
        features = connector.feature_norm(features)
    added = torch.zeros_like(mask, dtype=text.dtype).masked_fill(~mask, torch.finfo(text.dtype).min)
    blocks = connector.blocks(
        query_embeds=seen, query_length=number, attention_mask=added[:, None], encoder_hidden_states=features
    ).last_hidden_state
    return blocks[:, :number], blocks[:, number:]


def mask_of(is_text: Tensor, queries: int, writes: bool) -> Tensor:
    """Who sees whom [N, Q + T, Q + T] bool; `is_text` [N, T] is False behind the last word.

    Reading: all see all. Writing: a word sees the queries and the words up to itself, queries see queries alone.
    """
    number, length = is_text.shape
    mask = torch.cat([is_text.new_ones(number, queries), is_text], dim=1)[:, None].repeat(1, queries + length, 1)
    if writes:
        mask[:, :queries, queries:] = False
        mask[:, queries:, queries:] &= torch.ones(length, length, dtype=torch.bool, device=mask.device).tril()
    return mask
