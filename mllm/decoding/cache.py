"""Keys and values of one conversation, which may be cut back to any length.

Enters: the keys and values of new tokens, layer by layer, as transformers' attention hands them in. Leaves: those of
all tokens so far. Layers with a sliding window keep everything too: their mask hides what they may not see, and a
conversation can then be cut back exactly, which a window that has moved on cannot.

H heads, S tokens so far, C capacity, D width of a head; one conversation, so the first dimension is 1.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

SMALLEST = 512
"""Tokens of the smallest buffer."""


class KeptLayer(CacheLayerMixin):
    """Keys and values [1, H, C, D] of one layer, of which the first `length` count."""

    is_sliding = False
    keys: Any
    values: Any

    def __init__(self, least: int = SMALLEST) -> None:
        super().__init__()
        self.length, self.least = 0, least
        self.places: Tensor | None = None
        """Where the new tokens go [T] int64, told by whoever replays recorded kernels: then all C are given back, and
        a mask must hide those that do not count. None: behind the others."""

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys, self.values = key_states[:, :, :0], value_states[:, :, :0]
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """[1, H, T, D] of new tokens -> [1, H, S, D] of all, or [1, H, C, D] with `places`."""
        if self.places is not None:
            self.keys.index_copy_(2, self.places, key_states)
            self.values.index_copy_(2, self.places, value_states)
            return self.keys, self.values
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        end = self.length + key_states.shape[2]
        self.reserve(end, key_states, value_states)
        self.keys[:, :, self.length : end] = key_states
        self.values[:, :, self.length : end] = value_states
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]

    def reserve(self, tokens: int, key_states: Tensor, value_states: Tensor) -> None:
        """Make room for so many tokens; zeros, because whatever a mask hides is still multiplied by zero."""
        if tokens > self.keys.shape[2]:
            size = max(capacity(tokens), self.least)
            self.keys = widened(self.keys, key_states, self.length, size)
            self.values = widened(self.values, value_states, self.length, size)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the keys that `update` will give back."""
        return self.length + query_length, 0

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        return -1


class KeptCache(Cache):
    """A `KeptLayer` for each layer of the LLM, made as they ask for one."""

    layers: list[Any]

    def __init__(self) -> None:
        self.least = SMALLEST
        super().__init__(layer_class_to_replicate=lambda: KeptLayer(self.least))  # type: ignore[arg-type]

    @property
    def capacity(self) -> int:
        """C; 0 before the first token."""
        return self.layers[0].keys.shape[2] if self.layers else 0

    def reserve(self, tokens: int) -> None:
        """Have room for so many tokens without another buffer."""
        self.least = max(self.least, capacity(tokens))
        for layer in self.layers:
            layer.least = self.least
            layer.reserve(self.least, layer.keys, layer.values)

    def write_at(self, places: Tensor | None) -> None:
        """See `KeptLayer.places`."""
        for layer in self.layers:
            layer.places = places

    def keep(self, tokens: int) -> None:
        """Only the first ones. After a forward that was interrupted the layers may differ in what lies behind."""
        for layer in self.layers:
            assert tokens <= layer.length, f"{tokens} tokens to keep of {layer.length}"
            layer.length = tokens

    def advance(self, tokens: int) -> None:
        """So many more count: those that replayed kernels have written."""
        for layer in self.layers:
            layer.length += tokens


def capacity(tokens: int) -> int:
    """Buffers come in few sizes, half as large again each or less: 512, 768, 1024, 1536, ..."""
    size = SMALLEST
    while size < tokens:
        size = size * 3 // 2 if size & (size - 1) == 0 else size * 4 // 3
    return size


def widened(old: Tensor, like: Tensor, length: int, size: int) -> Tensor:
    """[1, H, C, D] -> [1, H, size, D] with the first `length` tokens of the old."""
    wider = like.new_zeros(*like.shape[:2], size, like.shape[3])
    wider[:, :, :length] = old[:, :, :length]
    return wider


def keeps_everything(llm: Any) -> bool:
    """Is all that this LLM remembers a key and a value a token? Recurrent states cannot be cut back."""
    kinds = set(getattr(llm.config, "layer_types", None) or ())
    return not getattr(llm, "_is_stateful", False) and kinds <= {"full_attention", "sliding_attention"}
