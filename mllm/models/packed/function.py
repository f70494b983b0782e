"""The kernels as attention functions of transformers: `mllm_varlen`, `mllm_fa2`, `mllm_by_sample`.

Enters: what a layer of an LLM hands to its attention function, with the boundaries of the samples in the mask's place.
Leaves: what the layer expects back. Anything else that an LLM is asked (to generate from a cache, to read a padded
batch) has a mask, or none, and goes to transformers' own sdpa: a model built for packed training can do all of it.

B rows, S tokens of a row, H query heads, G key-value heads, d width of a head.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from mllm.models.packed.boundaries import from_mask, is_boundaries
from mllm.models.packed.kernels import KERNELS, reference

NAMES = {"mllm_varlen": "varlen", "mllm_fa2": "flash", "mllm_by_sample": "by_sample"}
"""What the LLM's config says, and the kernel. transformers takes a name with "flash" in it for its own."""
BEYOND = {"softcap": "caps its attention scores", "s_aux": "has attention sinks", "position_bias": "adds a bias"}
"""What no kernel here does, as transformers names it."""


def register() -> None:
    """Make transformers know the names, before an LLM is built with one of them."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    for name, kernel in NAMES.items():
        AttentionInterface.register(name, functools.partial(packed_attention, kernel))
        AttentionMaskInterface.register(name, sdpa_mask)


def packed_attention(
    kernel: str,
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """[B, H, S, d], [B, G, S, d] twice -> [B, S, H, d].

    Raises:
        ValueError: the layer asks for what the kernel cannot do.
    """
    if not is_boundaries(attention_mask):
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, sliding_window=sliding_window, **kwargs
        )
    assert attention_mask is not None
    check_layer(module, query, value, dropout, kwargs)
    starts, longest = from_mask(attention_mask)
    batch, heads, length, width = query.shape
    dtype = half(value)
    q, k, v = (part.transpose(1, 2).flatten(0, 1).to(dtype) for part in (query, key, value))  # [B * S, H or G, d]
    scale = width**-0.5 if scaling is None else scaling
    run = KERNELS[kernel] if query.is_cuda or kernel == "by_sample" else reference
    out = run(q, k, v, starts, longest, scale, sliding_window)  # [B * S, H, d]
    return out.view(batch, length, heads, width), None


def half(value: Tensor) -> torch.dtype:
    """That in which the product is computed. Under autocast queries and keys are float32 again behind their rotation,
    and values are not."""
    device = value.device.type
    if value.dtype == torch.float32 and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return value.dtype


def check_layer(module: torch.nn.Module, query: Tensor, value: Tensor, dropout: float, more: dict[str, Any]) -> None:
    """Nothing is left out in silence."""
    found = [words for name, words in BEYOND.items() if more.get(name) is not None]
    if dropout:
        found.append("drops attention out")
    if value.shape[-1] != query.shape[-1]:
        found.append("has values of another width than its queries")
    if found:
        raise ValueError(
            f"{type(module).__name__} {' and '.join(found)}, which the kernels for packed rows do not: "
            f"set model.attention to flex, sdpa or eager"
        )
