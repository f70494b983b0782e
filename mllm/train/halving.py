"""A micro-batch that does not fit in memory is computed in halves.

Enters: this rank's micro-batches of a step, and the word of all ranks that memory ran out. Leaves: the same rows in
smaller micro-batches, for this step and all later ones. The loss of a step is a sum over rows divided by a number
that is known before, so that nothing of it changes.

B rows, S tokens of a row, N images.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, NoReturn

import torch

from mllm.data.collate import MULTIPLE
from mllm.types import IGNORE_INDEX, Batch

if TYPE_CHECKING:
    from accelerate import Accelerator

LEVERS = (
    "lower data.seq_length, switch on train.gradient_checkpointing, set train.mixed_precision bf16 or the LLM's dtype, "
    "train LoRA in place of the whole LLM, or shard more (DeepSpeed ZeRO 2, 3 or offload)"
)


@dataclass
class Room:
    """What fits on this rank. All ranks halve together, so that `rows` is the same on all."""

    rows: int | None = None
    """At most so many at a time; None as long as memory never ran out."""
    fitted: tuple[int, int, int] = (0, 0, 0)
    """The most rows, tokens of a row, and images of a micro-batch that were computed so far."""

    def cut(self, block: Sequence[Batch]) -> list[Batch]:
        """Micro-batches that are no larger than what fits."""
        return list(block) if self.rows is None else [part for batch in block for part in split(batch, self.rows)]

    def untried(self, block: Sequence[Batch]) -> bool:
        """Is one of these larger, in any way, than all before?"""
        return any(new > old for new, old in zip(largest(block), self.fitted, strict=True))

    def fits(self, block: Sequence[Batch]) -> None:
        """These were computed, forward and backward."""
        rows, tokens, images = (max(pair) for pair in zip(largest(block), self.fitted, strict=True))
        self.fitted = rows, tokens, images

    def halve(self, accelerator: Accelerator, block: Sequence[Batch]) -> None:
        """Say it, and go on with half as many rows at a time."""
        before = largest(block)[0]
        self.rows, self.fitted = max(1, before // 2), (0, 0, 0)
        torch.manual_seed(torch.initial_seed())  # dropout draws as if the step began now
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if accelerator.is_main_process:
            print(
                f"out of memory with {before} rows at a time: the run goes on with {self.rows}, with the same rows a "
                f"step and the same loss (train.rows_per_micro_batch {self.rows} begins with it)",
                file=sys.stderr,
                flush=True,
            )


def largest(block: Sequence[Batch]) -> tuple[int, int, int]:
    """Rows, tokens of a row and images: the most of each in one micro-batch."""
    rows, tokens = (max(batch["input_ids"].shape[axis] for batch in block) for axis in (0, 1))
    return rows, tokens, max(batch["num_images"] for batch in block)


def split(batch: Batch, rows: int) -> list[Batch]:
    """[B, S] -> micro-batches of at most `rows` rows, in order, each with its own images and no more padding than it
    needs. A part without an image has one blank image, as every batch has."""
    size = len(batch["input_ids"])
    images, samples = starts(batch["row_images"]), starts([len(ids) for ids in batch["sample_ids"]])
    parts = []
    for first in range(0, size, rows):
        last = min(first + rows, size)
        pixels = batch["pixel_values"][images[first] : images[last]]
        width, words = needed(batch, first, last), batch["instruction_ids"]
        ids = {id for row in batch["sample_ids"][first:last] for id in row}
        parts.append(
            Batch(
                input_ids=batch["input_ids"][first:last, :width],
                labels=batch["labels"][first:last, :width],
                position_ids=batch["position_ids"][first:last, :width],
                pixel_values=pixels if len(pixels) else torch.zeros_like(batch["pixel_values"][:1]),
                num_images=len(pixels),
                row_images=batch["row_images"][first:last],
                instruction_ids=words[images[first] : images[last]] if words is not None and len(pixels) else None,
                image_sizes=batch["image_sizes"][first:last],
                sample_ids=batch["sample_ids"][first:last],
                sources=batch["sources"][first:last],
                where=batch["where"][samples[first] : samples[last]],
                faults=[fault for fault in batch["faults"] if fault.id in ids],
            )
        )
    return parts


def starts(counts: Sequence[int]) -> list[int]:
    """Where the things of each row begin, and where the last row's end."""
    return [0, *accumulate(counts)]


def needed(batch: Batch, first: int, last: int) -> int:
    """Columns up to the last that is not padding in all of these rows, in whole multiples."""
    own = slice(first, last)
    used = (batch["input_ids"][own] != 0) | (batch["labels"][own] != IGNORE_INDEX) | (batch["position_ids"][own] != 0)
    columns = used.any(0).nonzero()
    end = int(columns[-1]) + 1 if len(columns) else 1
    return min(-(-end // MULTIPLE) * MULTIPLE, batch["input_ids"].shape[1])


def stop_out_of_memory(rows: int, where: Sequence[str], error: BaseException | None = None) -> NoReturn:
    """End the run with the setting to change."""
    named = f"in the micro-batch of {', '.join(where)}"
    if rows > 1:
        raise ValueError(
            f"out of memory with {rows} rows at a time, {named}: set train.rows_per_micro_batch {rows // 2} (the same "
            f"losses; halving in the run itself needs one process or DDP), or {LEVERS}"
        ) from error
    raise ValueError(f"out of memory with a single row, {named}: {LEVERS}") from error
