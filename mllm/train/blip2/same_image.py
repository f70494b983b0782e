"""Which rows have the same image, told by a number for each image.

Enters: images of a micro-batch [N, ...], as pixels or as the features that stand for them. Leaves: a digest of each
[N] int64, the same on every rank and device: an image with two captions is no negative of either.

The digest is a sum over all numbers, as integers of their bits, each times a weight of its own, modulo 2^64. Features
of one image have the same bits where they were computed once, or in groups of one size.
"""

from __future__ import annotations

import torch
from torch import Tensor

BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""By the bytes of a number: the integers that have as many."""
GOLDEN = -7046029254386353131
"""2^64 over the golden ratio, as signed integers have it: multiples of it are spread evenly (Knuth)."""


def digests(images: Tensor) -> Tensor:
    """[N, ...] -> [N] int64; one image at a time, since the integers take eight times the room of bytes."""
    bits = images.detach().flatten(1).contiguous().view(BITS[images.element_size()])
    return torch.stack([(row.long() * weights(bits.shape[1], bits.device)).sum() for row in bits])


def weights(number: int, device: torch.device) -> Tensor:
    """Odd numbers without a pattern [number] int64."""
    spread = torch.arange(1, number + 1, device=device) * GOLDEN
    return ((spread ^ (spread >> 29)) * GOLDEN) | 1
