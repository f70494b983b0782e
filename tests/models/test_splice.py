"""Visual tokens take the slots in order; counts are compared before anything is copied."""

from __future__ import annotations

import pytest
import torch

from mllm.models.splice import splice


def parts(slots: list[list[int]], images: int, tokens: int = 2, width: int = 3) -> tuple[torch.Tensor, ...]:
    where = torch.tensor(slots, dtype=torch.bool)
    visual = torch.arange(1.0, images * tokens * width + 1).reshape(images, tokens, width)
    return -torch.ones(*where.shape, width), where, visual


def test_visual_tokens_fill_the_slots_in_order_over_rows() -> None:
    embeddings, where, visual = parts([[0, 1, 1, 0, 0], [1, 1, 0, 1, 1]], images=3)
    out = splice(embeddings, where, visual)
    assert torch.equal(out[where], visual.flatten(0, 1))
    assert (out[~where] == -1).all()


def test_arguments_are_not_changed() -> None:
    embeddings, where, visual = parts([[1, 1, 0]], images=1)
    splice(embeddings, where, visual)
    assert (embeddings == -1).all()


def test_no_image_and_no_slot_change_nothing() -> None:
    embeddings, where, visual = parts([[0, 0, 0]], images=0)
    assert torch.equal(splice(embeddings, where, visual), embeddings)


def test_gradient_flows_into_tokens_and_surviving_embeddings_only() -> None:
    embeddings, where, visual = (t.requires_grad_(t.is_floating_point()) for t in parts([[0, 1, 1, 0]], images=1))
    splice(embeddings, where, visual).sum().backward()
    assert (visual.grad == 1).all()
    assert torch.equal(embeddings.grad[..., 0], (~where).float())


def test_visual_tokens_take_the_precision_of_the_text() -> None:
    embeddings, where, visual = parts([[1, 1]], images=1)
    assert splice(embeddings.bfloat16(), where, visual).dtype == torch.bfloat16


@pytest.mark.parametrize(("slots", "images"), [([[1, 1, 1, 0]], 1), ([[1, 0, 0]], 1), ([[0, 0]], 1), ([[1, 1]], 0)])
def test_unequal_counts_are_refused_with_both_numbers(slots: list[list[int]], images: int) -> None:
    with pytest.raises(ValueError, match=rf"{sum(slots[0])} placeholder slots .* {2 * images} visual tokens"):
        splice(*parts(slots, images))
