"""Rows to a batch: what has no image must not change what the others' pixels mean."""

from __future__ import annotations

import pytest
import torch

from mllm.data.collate import collate, stack_pixels
from mllm.types import Row

SHAPE = (3, 2, 2)
NONE = torch.empty(0, *SHAPE)
"""Float, as whoever does not know the processor makes it."""


def images(number: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.arange(number * 12).reshape(number, *SHAPE).to(dtype)


def row(pixel_values: torch.Tensor) -> Row:
    tokens = torch.arange(5)
    return Row(tokens, tokens, tokens, pixel_values, ["a"], ["a.json, row 1"])


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_rows_without_an_image_leave_the_others_pixels_as_they_are(dtype: torch.dtype) -> None:
    batch = collate([row(NONE), row(images(2, dtype)), row(NONE.to(dtype)), row(images(1, dtype))], SHAPE)
    assert batch["num_images"] == 3
    assert torch.equal(batch["pixel_values"], torch.cat([images(2, dtype), images(1, dtype)]))
    assert batch["pixel_values"].dtype == dtype


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_a_batch_without_any_image_holds_one_blank_of_the_processors_type(dtype: torch.dtype) -> None:
    batch = collate([row(NONE.to(dtype)), row(NONE.to(dtype))], SHAPE)
    assert (batch["num_images"], batch["pixel_values"].dtype) == (0, dtype)
    assert torch.equal(batch["pixel_values"], torch.zeros(1, *SHAPE, dtype=dtype))


def test_bytes_and_floats_are_never_mixed() -> None:
    with pytest.raises(AssertionError, match="several types"):
        stack_pixels([images(1, torch.uint8), images(1, torch.float32)], SHAPE)
