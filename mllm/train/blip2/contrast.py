"""Image-text contrast, and the negatives that are hardest to tell apart. Pure.

Enters: features of queries and of texts, and which texts or images are the same. Leaves: the loss of each pair, and for
each row the number of a row that looks like its partner and is not.

From BLIP-2 (Li et al. 2023, section 3.1): of all queries that which fits the text best counts; hard negatives are drawn
by these similarities (ALBEF, Li et al. 2021, section 3.2). B rows of this rank, G rows of all, Q queries, E width.
"""

from __future__ import annotations

import torch
from torch import Tensor

SMOOTHING = 0.1
"""Share of the target that is spread over all texts, as in the released code."""
NEVER = -1e4
"""Added to what must not be chosen: finite, so that nothing becomes nan."""


def similarities(queries: Tensor, texts: Tensor) -> Tensor:
    """[B, Q, E] and [G, E], both of length 1 -> [B, G]: the best of the queries."""
    return torch.einsum("bqe,ge->bqg", queries, texts).amax(dim=1)


def contrast(logits: Tensor, same: Tensor, counts: Tensor) -> Tensor:
    """[B, G] and which columns are a row's own, say the same or have the same image [B, G] -> the cross-entropy of each
    row [B].

    They share what is not smoothed; columns that do not count [G] are in no sum.
    """
    positive = (same & counts).float()
    spread = counts.float() / counts.sum().clamp(min=1)
    targets = (1 - SMOOTHING) * positive / positive.sum(1, keepdim=True).clamp(min=1) + SMOOTHING * spread
    return -(targets * logits.masked_fill(~counts, NEVER).log_softmax(dim=1)).sum(dim=1)


def hard_negatives(logits: Tensor, same: Tensor, counts: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """[B, G] -> for each row a column drawn by softmax of its logits [B] int64, and whether there was any [B] bool.

    Never the own one nor one of the same text or image. `noise` [B, G] is uniform in (0, 1): the largest logit under
    Gumbel noise is a draw from the softmax.
    """
    allowed = ~same & counts
    gumbel = -(-noise.clamp(1e-9, 1 - 1e-7).log()).log()
    chosen = (logits.detach().float() + gumbel).masked_fill(~allowed, -torch.inf).argmax(dim=1)
    return chosen, allowed.any(dim=1)
