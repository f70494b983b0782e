"""Kernels for attention over samples of many lengths that lie side by side in one row.

Enters: queries [T, H, d], keys and values [T, G, d] in half precision, where each sample begins [M + 1] and the length
of the longest. Leaves: [T, H, d]. Every sample is causal, and sees the last `window` tokens only where one is given.

`varlen` is torch's own (FlashAttention's, in torch since 2.10), `flash` that of the flash-attn package, `by_sample` is
torch's sdpa on one sample after the other, for CPUs. `reference` says the same by a mask of all pairs: it proves the
others, and runs anywhere.

T tokens of all rows, H query heads, G key-value heads, d width of a head, M samples.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

try:
    from torch.nn.attention.varlen import varlen_attn

    VARLEN = frozenset(inspect.signature(varlen_attn).parameters)
except ImportError:
    VARLEN = frozenset()
"""Names that torch's function takes; none where this torch has no such function."""
Kernel = Callable[[Tensor, Tensor, Tensor, Tensor, int, float, int | None], Tensor]
"""query, key, value, starts, longest, scale, window."""


def varlen(
    query: Tensor, key: Tensor, value: Tensor, starts: Tensor, longest: int, scale: float, window: int | None
) -> Tensor:
    """torch.nn.attention.varlen, whose parameters differ from one torch to the next."""
    given: dict[str, Any] = {}
    if "window_size" in VARLEN:  # -1 without an end; the token itself is not counted
        given["window_size"] = (-1 if window is None else window - 1, 0)
    else:  # torch 2.10
        assert window is None, "checked in choice.py"
        given["is_causal"] = True
    if "scale" in VARLEN:
        given["scale"] = scale
    else:
        query = query * (scale * query.shape[-1] ** 0.5)
    if "enable_gqa" in VARLEN:
        given["enable_gqa"] = key.shape[1] != query.shape[1]
    call: Any = varlen_attn
    return call(query, key, value, starts, starts, longest, longest, **given)


def flash(
    query: Tensor, key: Tensor, value: Tensor, starts: Tensor, longest: int, scale: float, window: int | None
) -> Tensor:
    """flash_attn.flash_attn_varlen_func (flash-attn 2)."""
    from flash_attn import flash_attn_varlen_func

    seen = (-1 if window is None else window - 1, 0)
    options = {"softmax_scale": scale, "causal": True, "window_size": seen}
    return flash_attn_varlen_func(query, key, value, starts, starts, longest, longest, **options)


@functools.cache
def has_flash() -> bool:
    """Is flash-attn installed? It is imported by who runs it."""
    return importlib.util.find_spec("flash_attn") is not None


def by_sample(
    query: Tensor, key: Tensor, value: Tensor, starts: Tensor, longest: int, scale: float, window: int | None
) -> Tensor:
    """Each sample alone: a row costs the squares of its samples' lengths, and not the square of its own."""
    lengths = [length for length in starts.diff().tolist() if length]
    grouped, parts = key.shape[1] != query.shape[1], []
    for q, k, v in zip(*(part.transpose(0, 1)[None].split(lengths, 2) for part in (query, key, value)), strict=True):
        tokens, seen = q.shape[2], None
        if window is not None and tokens > window:
            seen = torch.ones(tokens, tokens, dtype=torch.bool).tril().triu(1 - window)
        parts.append(  # [1, H, length, d]
            scaled_dot_product_attention(
                q, k, v, attn_mask=seen, is_causal=seen is None, scale=scale, enable_gqa=grouped
            )
        )
    return torch.cat(parts, 2)[0].transpose(0, 1)


def reference(
    query: Tensor, key: Tensor, value: Tensor, starts: Tensor, longest: int, scale: float, window: int | None
) -> Tensor:
    """By a mask [T, T]."""
    at = torch.arange(len(query), device=query.device)
    sample = torch.bucketize(at, starts, right=True)  # [T]
    distance = at[:, None] - at
    seen = (sample[:, None] == sample) & (distance >= 0)  # [T, T]
    if window is not None:
        seen = seen & (distance < window)
    groups = query.shape[1] // key.shape[1]
    key, value = (part.repeat_interleave(groups, 1).transpose(0, 1)[None] for part in (key, value))
    out = scaled_dot_product_attention(query.transpose(0, 1)[None], key, value, attn_mask=seen, scale=scale)
    return out[0].transpose(0, 1)


KERNELS: dict[str, Kernel] = {"varlen": varlen, "flash": flash, "by_sample": by_sample}
