"""One forward in which nothing depends on how long the conversation is: what a CUDA graph can record.

Enters: tokens [1, T], their positions [T] in a tensor, the cache. Leaves: the likeliest token behind one of them. The
new keys and values are written at the positions, all C places of the buffers are read, and a mask hides those behind.

T tokens, C capacity of the cache, H heads of queries, K of keys, G = H / K, D width of a head.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from mllm.decoding.cache import KeptCache


class FixedForward:
    """The tensors that it reads and writes stay where they are."""

    def __init__(self, llm: Any, cache: KeptCache, width: int, attention: str = "") -> None:
        """`attention` is the name of a function for transformers; not given: its own that reads a mask."""
        self.llm, self.cache, self.width = llm, cache, width
        self.attention = attention or masked_attention(llm)
        table = llm.get_input_embeddings().weight
        self.positions = torch.zeros(width, dtype=torch.long, device=table.device)
        self.last = torch.zeros(1, dtype=torch.long, device=table.device)
        """Row of the token whose successor is wanted; rows behind it are padding, and nobody sees them."""
        self.token = torch.zeros(1, 1, dtype=torch.long, device=table.device)
        self.embeddings = table.new_zeros(1, width, table.shape[1])
        """[1, T, D] of a width above 1; one token is looked up in the table."""

    def __call__(self) -> None:
        """Compute; the successor goes to `token`. One of width 1 is then ready for the next."""
        self.token.copy_(self.logits()[0].argmax(-1, keepdim=True))
        if self.width == 1:
            self.positions.add_(1)

    def logits(self) -> Tensor:
        """Behind the last row [1, 1, vocabulary]."""
        new = {"input_ids": self.token} if self.width == 1 else {"inputs_embeds": self.embeddings}
        dtype = self.llm.dtype if self.attention == "eager" else None
        with self.fixed():
            found = self.llm(
                **new,
                position_ids=self.positions[None],
                attention_mask=masks_of(self.llm.config, self.positions, self.cache.capacity, dtype),
                past_key_values=self.cache,
                use_cache=True,
                logits_to_keep=self.last,
            )
        return found.logits

    @contextmanager
    def fixed(self) -> Iterator[None]:
        """The cache writes at the positions, and the LLM attends by masks alone."""
        config = self.llm.config
        before = config._attn_implementation
        try:
            config._attn_implementation = self.attention
            self.cache.write_at(self.positions)
            yield
        finally:
            config._attn_implementation = before
            self.cache.write_at(None)


def masked_attention(llm: Any) -> str:
    """Kernels for packed rows know their samples otherwise; an LLM that caps its scores has eager attention alone."""
    eager = llm.config._attn_implementation == "eager" or not getattr(llm, "_supports_sdpa", True)
    return "eager" if eager else "sdpa"


def masks_of(config: Any, positions: Tensor, size: int, dtype: torch.dtype | None) -> Tensor | dict[str, Tensor]:
    """What each kind of layer may see: one mask, or one by kind where the LLM has both."""
    kinds, window = getattr(config, "layer_types", None), getattr(config, "sliding_window", None)
    if window is None or (kinds and "sliding_attention" not in kinds):
        return mask(positions, size, None, dtype)
    if not kinds or "full_attention" not in kinds:
        return mask(positions, size, window, dtype)
    windows = {"full_attention": None, "sliding_attention": window}
    return {kind: mask(positions, size, seen, dtype) for kind, seen in windows.items()}


def mask(positions: Tensor, size: int, window: int | None, dtype: torch.dtype | None) -> Tensor:
    """[1, 1, T, C]: where a query may look; with a dtype as numbers to add, for transformers' eager attention."""
    places = torch.arange(size, device=positions.device)
    seen = places <= positions[:, None]
    if window is not None:
        seen = seen & (places > positions[:, None] - window)
    if dtype is None:
        return seen[None, None]
    return torch.zeros_like(seen, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)[None, None]


def one_token(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of one query [1, H, 1, D] to keys and values [1, K, C, D] -> [1, 1, H, D], in float32.

    Sums of products, which a compiler makes few kernels of; scaled_dot_product_attention has none that is fast for one
    query of few heads.
    """
    heads, width = key.shape[1], query.shape[-1]
    asked = query.view(heads, -1, 1, width).float() * (scaling or width**-0.5)  # [K, G, 1, D]
    scores = (asked * key[0][:, None].float()).sum(-1)  # [K, G, C]
    shares = scores.masked_fill(~attention_mask[0, 0], float("-inf")).softmax(-1)
    found = (shares[..., None] * value[0][:, None].float()).sum(-2)  # [K, G, D]
    return found.to(query.dtype).view(1, 1, -1, found.shape[-1]), None
