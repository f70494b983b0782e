"""Where the samples of packed rows begin: what attention kernels for many lengths (`varlen`) are told.

Enters: positions [B, S], which restart at each sample. Leaves: the first token of each sample, counted through all
rows, and the length of the longest; one small tensor a micro-batch, made on the host, where looking costs nothing.

The same tensor goes to every layer in the place of an attention mask. transformers hands on any mask of four
dimensions as it is, in all families, and builds none of its own then: `as_mask` gives it four.

B rows, S tokens of a row, M samples of a micro-batch, L tokens of the longest.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

LENGTHS, SAMPLES = 128, 32
"""L and M are rounded up to these: kernels cut a sample into blocks of 128, empty samples cost nothing, and compiled
code meets few sizes."""


class Boundaries(NamedTuple):
    """Token `starts[i]` of all rows is the first of sample i, and what lies behind the last start is empty."""

    starts: Tensor  # [M + 1] int32, filled up with B * S
    longest: int  # L


def boundaries(position_ids: Tensor) -> Boundaries:
    """[B, S] int64 -> the samples in it; positions on a device are waited for."""
    position_ids = position_ids.cpu()
    starts = sample_starts(position_ids).flatten().nonzero().flatten()  # [M]
    total = position_ids.numel()
    longest = int(torch.diff(starts, append=torch.tensor([total])).max())
    missing = -len(starts) % SAMPLES + 1
    return Boundaries(pad(starts, (0, missing), value=total).int(), -(-longest // LENGTHS) * LENGTHS)


def sample_starts(position_ids: Tensor) -> Tensor:
    """[B, S] bool: where a sample begins. Padding, which is position 0 to the end of its row, is cut into samples of
    one block: each of its tokens by itself would be many samples for a kernel, and all in one a long one. A row never
    goes on in the next."""
    starts = position_ids == 0
    is_padding = position_ids.flip(1).cummax(1).values.flip(1) == 0
    is_padding[:, 1:] &= starts[:, :-1]  # but not the first of these zeros, which may be a sample of one token
    in_block = torch.arange(position_ids.shape[1]) % LENGTHS != 0
    starts &= ~(is_padding & in_block)
    starts[:, 0] = True
    return starts


def as_mask(samples: Boundaries) -> Tensor:
    """[1, 1, L, M + 1] int32, where it will stay: the length of the longest is a size, so that a kernel that wants a
    number does not wait for the device. Takes no memory of its own."""
    mask = samples.starts[None, None, None].expand(1, 1, samples.longest, -1)
    for size in (2, 3):
        torch._dynamo.maybe_mark_dynamic(mask, size)
    return mask


def from_mask(mask: Tensor) -> tuple[Tensor, int]:
    """What `as_mask` made: starts [M + 1] and L."""
    return mask[0, 0, 0], mask.shape[2]


def is_boundaries(mask: Tensor | None) -> bool:
    """Masks of transformers are of bool or of a float type."""
    return mask is not None and mask.dtype == torch.int32
