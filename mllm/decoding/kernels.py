"""Triton kernels for one token of an LLM of Llama's kind: six a layer, each as long as it takes to read its weights.

Enters: a token's hidden state [K] and weights in bfloat16 or float16; keys and values [H, C, D] of earlier tokens.
Leaves: the same numbers as the layers of transformers, up to rounding (sums are in float32 throughout).

What stands around a product of a matrix and a vector (norm, bias, SiLU, residual) is done by the kernel that reads the
matrix. Attention goes over pieces of the keys side by side and joins them afterwards (flash decoding, Dao et al. 2023).

K N widths in and out, H heads of keys, G queries that share one, C capacity of the cache, D width of a head.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

SPLITS = 32
"""Pieces of the keys."""
KEYS = 32
"""Keys that are read at once."""
GROUP = tl.constexpr(16)
"""Rows of a product on tensor cores; more queries than share a key in any LLM of this kind."""


SHAPES = [(1, 1024, 4), (2, 1024, 4), (4, 512, 4), (4, 1024, 8)]
"""Rows and columns that are read at once, and warps: the fastest is found at the first product of each size."""


def quick_bench(run: Any, quantiles: Any = None) -> Any:
    return triton.testing.do_bench(run, warmup=5, rep=20, quantiles=quantiles)


@triton.autotune(
    [triton.Config({"ROWS": rows, "BLOCK": block}, num_warps=warps) for rows, block, warps in SHAPES],
    key=["N", "K", "GATED"],
    do_bench=quick_bench,
)
@triton.jit
def matvec_kernel(
    x, weight, second, bias, gain, residual, out, N, eps, K: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_NORM: tl.constexpr, HAS_RESIDUAL: tl.constexpr, GATED: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = rows < N
    start = rows.to(tl.int64)[:, None] * K
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    other = tl.zeros([ROWS, BLOCK], tl.float32)
    squares = tl.zeros([BLOCK], tl.float32)
    for k in range(0, K, BLOCK):
        columns = k + tl.arange(0, BLOCK)
        known = columns < K
        value = tl.load(x + columns, mask=known, other=0.0).to(tl.float32)
        if HAS_NORM:
            squares += value * value
            value *= tl.load(gain + columns, mask=known, other=0.0).to(tl.float32)
        both = inside[:, None] & known[None, :]
        total += tl.load(weight + start + columns[None, :], mask=both, other=0.0).to(tl.float32) * value[None, :]
        if GATED:
            other += tl.load(second + start + columns[None, :], mask=both, other=0.0).to(tl.float32) * value[None, :]
    found = tl.sum(total, 1)
    scale = 1.0
    if HAS_NORM:
        scale = tl.rsqrt(tl.sum(squares, 0) / K + eps)
        found *= scale
    if HAS_BIAS:
        found += tl.load(bias + rows, mask=inside, other=0.0).to(tl.float32)
    if GATED:
        found = found * tl.sigmoid(found) * (tl.sum(other, 1) * scale)
    if HAS_RESIDUAL:
        found += tl.load(residual + rows, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + rows, found.to(out.dtype.element_ty), mask=inside)


@triton.jit
def attention_kernel(
    asked, keys, values, cosine, sine, position, partial, peaks, sums, C, scale,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, KEYS: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    head, split = tl.program_id(0), tl.program_id(1)
    now = tl.load(position)
    half: tl.constexpr = D // 2
    group, low, whole = tl.arange(0, GROUP), tl.arange(0, half), tl.arange(0, D)
    cos_low, cos_high = tl.load(cosine + low).to(tl.float32), tl.load(cosine + half + low).to(tl.float32)
    sin_low, sin_high = tl.load(sine + low).to(tl.float32), tl.load(sine + half + low).to(tl.float32)
    own = group[:, None] < G
    query = asked + (head * G + group)[:, None] * D + low[None, :]
    left = tl.load(query, mask=own, other=0.0).to(tl.float32)
    right = tl.load(query + half, mask=own, other=0.0).to(tl.float32)
    kind = keys.dtype.element_ty
    q_low = (left * cos_low[None, :] - right * sin_low[None, :]).to(kind)
    q_high = (right * cos_high[None, :] + left * sin_high[None, :]).to(kind)
    peak = tl.full([GROUP], -1e30, tl.float32)
    summed = tl.zeros([GROUP], tl.float32)
    found = tl.zeros([GROUP, D], tl.float32)
    piece = tl.cdiv(tl.cdiv(now, SPLITS), KEYS) * KEYS
    begin = split * piece
    for first in range(begin, tl.minimum(begin + piece, now), KEYS):
        place = first + tl.arange(0, KEYS)
        there = place < now
        row = (head * C + place) * D
        k_low = tl.load(keys + row[:, None] + low[None, :], mask=there[:, None], other=0.0)
        k_high = tl.load(keys + row[:, None] + half + low[None, :], mask=there[:, None], other=0.0)
        scores = (tl.dot(q_low, tl.trans(k_low)) + tl.dot(q_high, tl.trans(k_high))) * scale
        scores = tl.where(there[None, :], scores, -1e30)
        higher = tl.maximum(peak, tl.max(scores, 1))
        shares = tl.where(there[None, :], tl.exp(scores - higher[:, None]), 0.0)
        fade = tl.exp(peak - higher)
        value = tl.load(values + row[:, None] + whole[None, :], mask=there[:, None], other=0.0)
        found = found * fade[:, None] + tl.dot(shares.to(kind), value)
        summed = summed * fade + tl.sum(shares, 1)
        peak = higher
    if split == SPLITS - 1:  # the token's own key and value
        k = asked + (H * G + head) * D
        k_left, k_right = tl.load(k + low).to(tl.float32), tl.load(k + half + low).to(tl.float32)
        k_low_new = (k_left * cos_low - k_right * sin_low).to(kind)
        k_high_new = (k_right * cos_high + k_left * sin_high).to(kind)
        v_new = tl.load(asked + (H * G + H + head) * D + whole).to(kind)
        place_new = (head * C + now) * D
        tl.store(keys + place_new + low, k_low_new)
        tl.store(keys + place_new + half + low, k_high_new)
        tl.store(values + place_new + whole, v_new)
        score = tl.sum(q_low.to(tl.float32) * k_low_new.to(tl.float32)[None, :], 1)
        score = (score + tl.sum(q_high.to(tl.float32) * k_high_new.to(tl.float32)[None, :], 1)) * scale
        highest = tl.maximum(peak, score)
        fades, share = tl.exp(peak - highest), tl.exp(score - highest)
        found = found * fades[:, None] + share[:, None] * v_new.to(tl.float32)[None, :]
        summed = summed * fades + share
        peak = highest
    slot = (head * SPLITS + split) * GROUP + group
    tl.store(partial + slot[:, None] * D + whole[None, :], found)
    tl.store(peaks + slot, peak)
    tl.store(sums + slot, summed)


@triton.jit
def join_kernel(partial, peaks, sums, out, G: tl.constexpr, D: tl.constexpr, SPLITS: tl.constexpr):
    query = tl.program_id(0)
    splits, whole = tl.arange(0, SPLITS), tl.arange(0, D)
    slots = (query // G * SPLITS + splits) * GROUP + query % G
    peak = tl.load(peaks + slots)
    fade = tl.exp(peak - tl.max(peak, 0))
    total = tl.sum(tl.load(sums + slots) * fade, 0)
    found = tl.sum(tl.load(partial + slots[:, None] * D + whole[None, :]) * fade[:, None], 0) / total
    tl.store(out + query * D + whole, found.to(out.dtype.element_ty))


def matvec(
    x: Tensor,
    weight: Tensor,
    second: Tensor | None = None,
    bias: Tensor | None = None,
    norm: Any = None,
    residual: Tensor | None = None,
) -> Tensor:
    """[K] -> [N] by a weight [N, K]; the norm goes before it, SiLU(weight x) * (second x) where there is a second one,
    then the residual."""
    n, k = weight.shape
    out = torch.empty(n, dtype=x.dtype, device=x.device)
    matvec_kernel[lambda chosen: (triton.cdiv(n, chosen["ROWS"]),)](
        x, weight, second, bias, norm and norm.weight, residual, out, n, norm.variance_epsilon if norm else 0.0, K=k,
        HAS_BIAS=bias is not None, HAS_NORM=norm is not None, HAS_RESIDUAL=residual is not None,
        GATED=second is not None,
    )  # fmt: skip
    return out


def attend(
    asked: Tensor, keys: Tensor, values: Tensor, cosine: Tensor, sine: Tensor, position: Tensor, scale: float
) -> Tensor:
    """Queries, key and value of a token, side by side and not yet turned [(H * G + 2 * H) * D] -> [H * G * D]; its key
    and value are written to the cache [1, H, C, D] at its position."""
    _, heads, size, width = keys.shape
    queries = asked.numel() // width - 2 * heads
    partial = torch.empty(heads * SPLITS * GROUP.value * width, dtype=torch.float32, device=asked.device)
    peaks, sums = torch.empty(2, heads * SPLITS * GROUP.value, dtype=torch.float32, device=asked.device)
    attention_kernel[(heads, SPLITS)](
        asked, keys, values, cosine, sine, position, partial, peaks, sums, size, scale,
        H=heads, G=queries // heads, D=width, KEYS=KEYS, SPLITS=SPLITS,
    )  # fmt: skip
    out = torch.empty(queries * width, dtype=asked.dtype, device=asked.device)
    join_kernel[(queries,)](partial, peaks, sums, out, G=queries // heads, D=width, SPLITS=SPLITS)
    return out
