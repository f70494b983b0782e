"""Visual tokens take the places that the processor kept for them.

Enters: token embeddings [B, S, D], the places of the placeholders, visual tokens [N, V, D], or [T, D] where not all
images have as many. Leaves: embeddings [B, S, D] with the visual tokens in their slots, in order of appearance. Pure;
the two counts are compared before anything is copied.

B rows, S tokens of a row, N images, V visual tokens an image, T of all images, D width of the LLM.
"""

from __future__ import annotations

import torch
from torch import Tensor


def splice(embeddings: Tensor, places: Tensor, visual_tokens: Tensor) -> Tensor:
    """Overwrite placeholder embeddings with visual tokens; gradients flow into both arguments' surviving parts.

    `places` are the slots as numbers [N * V] int64, counted through all rows, or marked [B, S] bool. A device
    that holds marks is waited for.

    Raises:
        ValueError: there are more or fewer placeholders than visual tokens.
    """
    slots = slot_numbers(places) if places.dtype == torch.bool else places
    flat = one_sequence(visual_tokens).to(embeddings.dtype)  # [T, D]
    if len(slots) != len(flat):
        made = f" ({visual_tokens.shape[0]} images of {visual_tokens.shape[1]})" if visual_tokens.ndim == 3 else ""
        raise ValueError(
            f"{len(slots)} placeholder slots in the text but {len(flat)} visual tokens{made}: "
            f"the processor and the connector disagree"
        )
    return embeddings.flatten(0, 1).index_copy(0, slots, flat).view_as(embeddings)  # [B, S, D]


def slot_numbers(is_placeholder: Tensor) -> Tensor:
    """[B, S] bool -> the numbers of the marked ones [T] int64."""
    return is_placeholder.flatten().nonzero().flatten()


def one_sequence(visual_tokens: Tensor) -> Tensor:
    """[N, V, D] or [T, D] -> [T, D], in order of appearance."""
    return visual_tokens.flatten(0, 1) if visual_tokens.ndim == 3 else visual_tokens
