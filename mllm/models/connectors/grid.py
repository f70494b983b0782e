"""Patches in a row and patches in a square, for the connectors that look at neighbours.

Enters: features [N, P, Dv] in reading order. Leaves: the same as maps [N, Dv, side, side], and back; or an error in
words where a number of patches or tokens makes no square.

N images, P patches, Dv width.
"""

from __future__ import annotations

from math import isqrt

from torch import Tensor


def to_maps(features: Tensor) -> Tensor:
    """[N, P, Dv] -> [N, Dv, side, side]."""
    side = isqrt(features.shape[1])
    return features.transpose(1, 2).unflatten(2, (side, side))


def from_maps(maps: Tensor) -> Tensor:
    """[N, D, side, side] -> [N, side * side, D]."""
    return maps.flatten(2).transpose(1, 2)


def check_pooling(kind: str, tokens: int, num_patches: int) -> int:
    """The number of tokens, if that many can be pooled from so many patches.

    Raises:
        ValueError: one of the two is no square, or there are more tokens than patches.
    """
    for number, what in ((num_patches, "patches"), (tokens, "tokens")):
        if number < 1 or isqrt(number) ** 2 != number:
            raise ValueError(f"a {kind} connector of {tokens} tokens on {num_patches} patches: {what} must be a square")
    if tokens > num_patches:
        raise ValueError(
            f"a {kind} connector of {tokens} tokens on {num_patches} patches: pooling makes no tokens more; "
            f"set connector.tokens to a square of at most {num_patches}"
        )
    return tokens
