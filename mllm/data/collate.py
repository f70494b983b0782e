"""Rows to the tensors of one micro-batch.

Enters: rows of any length. Leaves: a `Batch` whose rows are padded to one length, the longest's or a given one. The
padding is inert: ignored labels and position 0 everywhere, so that each padded token is a sample of its own that nobody
looks at. A batch without an image gets one blank image, because every rank must call the encoder in every micro-batch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from mllm.types import IGNORE_INDEX, Batch, Row

MULTIPLE = 8
"""Rows are as long as the longest, rounded up to this: what tensor cores like, and few distinct shapes."""


def collate(rows: Sequence[Row], pixel_shape: tuple[int, int, int], length: int | None = None) -> Batch:
    """Stack rows: tokens [B, S] int64, images [max(N, 1), 3, H, W] in order of appearance. S is `length`, where one is
    given: what is compiled for one length need not be compiled again."""
    pixel_values = stack_pixels([row.pixel_values for row in rows], pixel_shape)
    row_images = [len(row.pixel_values) for row in rows]
    return Batch(
        input_ids=stack([row.input_ids for row in rows], 0, length),
        labels=stack([row.labels for row in rows], IGNORE_INDEX, length),
        position_ids=stack([row.position_ids for row in rows], 0, length),
        pixel_values=pixel_values,
        num_images=sum(row_images),
        row_images=row_images,
        instruction_ids=stack_instructions([words for row in rows for words in row.instructions]),
        image_sizes=[row.image_sizes for row in rows],
        sample_ids=[row.sample_ids for row in rows],
        where=[where for row in rows for where in row.where],
        sources=[row.sources for row in rows],
        faults=[fault for row in rows for fault in row.faults],
    )


def stack_pixels(parts: Sequence[Tensor], pixel_shape: tuple[int, int, int]) -> Tensor:
    """[n_i, 3, H, W] each -> [max(N, 1), 3, H, W], a blank one if there is none.

    Parts without an image do not count: an empty float one would make float32 of its neighbours' uint8, and float32
    means that they are normalised.
    """
    shown = [part for part in parts if len(part)] or [parts[0].new_zeros(1, *pixel_shape)]
    assert len({part.dtype for part in shown}) == 1, f"pixels of several types: {[part.dtype for part in shown]}"
    return torch.cat(shown)


def stack_instructions(instructions: Sequence[list[int]]) -> Tensor | None:
    """Tokens of each image's instruction -> [N, T], filled up with -1; None where there are none."""
    if not instructions:
        return None
    return pad_sequence([torch.tensor(words or [-1]) for words in instructions], batch_first=True, padding_value=-1)


def stack(tensors: list[Tensor], fill: int, length: int | None = None) -> Tensor:
    """[T_i] each -> [B, S] with S the longest, rounded up, or what is given; at least one token wide."""
    padded = pad_sequence(tensors, batch_first=True, padding_value=fill)
    if length is not None:
        assert padded.shape[1] <= length, f"a row of {padded.shape[1]} tokens where rows have {length}"
        return torch.nn.functional.pad(padded, (0, length - padded.shape[1]), value=fill)
    missing = -padded.shape[1] % MULTIPLE if padded.shape[1] else MULTIPLE
    return torch.nn.functional.pad(padded, (0, missing), value=fill)
