"""Visual tokens take the places that the processor kept for them.

Enters: token embeddings [B, S, D], where the placeholders are [B, S], visual tokens [N, V, D]. Leaves: embeddings
[B, S, D] with the visual tokens in their slots, in order of appearance. Pure; the two counts are compared before
anything is copied.

B rows, S tokens of a row, N images, V visual tokens an image, D width of the LLM.
"""

from __future__ import annotations

from torch import Tensor


def splice(embeddings: Tensor, is_placeholder: Tensor, visual_tokens: Tensor) -> Tensor:
    """Overwrite placeholder embeddings with visual tokens; gradients flow into both arguments' surviving parts.

    Raises:
        ValueError: there are more or fewer placeholders than visual tokens.
    """
    slots, tokens = int(is_placeholder.sum()), visual_tokens.shape[0] * visual_tokens.shape[1]
    if slots != tokens:
        raise ValueError(
            f"{slots} placeholder slots in the text but {tokens} visual tokens "
            f"({visual_tokens.shape[0]} images of {visual_tokens.shape[1]}): the processor and the connector disagree"
        )
    flat = visual_tokens.flatten(0, 1).to(embeddings.dtype)  # [N * V, D]
    return embeddings.masked_scatter(is_placeholder.unsqueeze(-1), flat)  # [B, S, D]
