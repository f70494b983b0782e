"""The layers of an LLM compiled, one for all: as long as the block lasts.

Enters: an LLM, its cache. Leaves: nothing; inside the block each layer runs through one compiled function that takes
the layer as an argument. Compiled as they stand they would be compiled one by one, because each knows its number, and
a model of 28 layers would take minutes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mllm.decoding.cache import KeptCache, KeptLayer
from mllm.decoding.fixed import masked_attention, one_token
from mllm.models.vision_encoder import layer_list

ATTENTION = "mllm_one_token"


@dataclass
class OneLayer:
    """The cache as one layer sees it."""

    keys: Tensor
    values: Tensor
    places: Tensor

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self.keys.index_copy_(2, self.places, key_states)
        self.values.index_copy_(2, self.places, value_states)
        return self.keys, self.values


def call(layer: nn.Module, hidden: Tensor, keys: Tensor, values: Tensor, places: Tensor, options: Any) -> Any:
    """The layer's own forward, with its part of the cache."""
    return type(layer).forward(layer, hidden, past_key_values=OneLayer(keys, values, places), **options)


def compiler(backend: str = "inductor", **options: Any) -> Any:
    """The one function; keep it as long as the LLM, and it is compiled once."""
    return torch.compile(call, backend=backend, options=options or None)


def attention_for_one(llm: Any) -> str:
    """The name of the attention function that is compiled best."""
    from transformers import AttentionInterface

    AttentionInterface.register(ATTENTION, one_token)
    return ATTENTION if masked_attention(llm) == "sdpa" else "eager"


@contextmanager
def compiled_layers(llm: Any, cache: KeptCache, run: Any) -> Iterator[None]:
    """Inside, the decoder's layers go through `run` (see `compiler`), one query at a time."""
    layers = layer_list(llm.get_decoder())
    parts: list[Any] = [module for layer in layers for module in layer.modules()]
    numbered = [(module, module.layer_idx) for module in parts if hasattr(module, "layer_idx")]
    try:
        for module, _ in numbered:
            module.layer_idx = 0
        for layer, kept in zip(layers, cache.layers, strict=True):
            layer.forward = partial(through, run, layer, kept)
        yield
    finally:
        for module, number in numbered:
            module.layer_idx = number
        for layer in layers:
            layer.__dict__.pop("forward", None)


def through(run: Any, layer: nn.Module, kept: KeptLayer, hidden: Tensor, past_key_values: Any, **options: Any) -> Any:
    return run(layer, hidden, kept.keys, kept.values, kept.places, options)
