"""Planned rows become batches, on any rank, in any worker.

Enters: an index, a plan and this rank's place. Leaves: a `DataLoader` whose i-th item is the i-th micro-batch of this
rank from the step on that is asked for. Nothing here draws a random number: item i is a function of i.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch.utils.data import DataLoader, Dataset

from mllm.data.collate import collate
from mllm.data.formats import SourceConfig
from mllm.data.index import Index
from mllm.data.packing import join
from mllm.data.plan import Plan
from mllm.data.processor import ImageFit, Processor
from mllm.schema import Fraction, NotNegativeInt, Positive, Schema
from mllm.types import IGNORE_INDEX, Batch, Example, Sample


@dataclass
class DataConfig(Schema):
    """What is learned from, and how it is laid out in rows."""

    sources: list[SourceConfig] = field(default_factory=list)
    """Files of records, each with its `format`."""
    seq_length: Positive = 2048
    """Tokens of a row; longer samples are cut, never through an image."""
    packing: bool = True
    """Several samples a row, isolated from each other; without it, one sample a row, padded to the longest."""
    image_fit: ImageFit = "native"
    """`native`: the encoder's own crop. `pad`: pad to a square with the mean colour first."""
    num_workers: NotNegativeInt = 2
    """Processes that read and decode ahead; 0 does it in the training process."""
    keep_in_memory: bool = False
    """Each worker keeps tokens and pixels after the first time; for small sets that are seen many times."""
    max_bad_share: Fraction = 0.001
    """Share of records that may be unusable before the run stops. They are named in quarantine.jsonl either way."""


@dataclass(frozen=True)
class Share:
    """The part of each step that is this rank's: row r of a step belongs to rank r % world_size."""

    rank: int
    world_size: int
    rows: int
    """Rows of one micro-batch on this rank."""


class PlannedBatches(Dataset[Batch]):
    """Item i is this rank's i-th micro-batch since step 0."""

    def __init__(self, index: Index, plan: Plan, processor: Processor, share: Share) -> None:
        self.index, self.plan, self.processor, self.share = index, plan, processor, share
        self.accumulation = plan.rows_per_step // (share.rows * share.world_size)
        if self.accumulation * share.rows * share.world_size != plan.rows_per_step:
            raise ValueError(
                f"train.rows_per_step {plan.rows_per_step} is no multiple of {share.world_size} ranks x "
                f"{share.rows} rows_per_micro_batch: change one of them"
            )

    def __getitem__(self, item: int) -> Batch:
        step, micro = divmod(item, self.accumulation)
        mine = self.plan.rows(step)[self.share.rank :: self.share.world_size]
        rows = mine[micro * self.share.rows : (micro + 1) * self.share.rows]
        shape = self.processor.pixel_shape
        return collate([join([self.example(sample) for sample in row], shape) for row in rows], shape)

    def example(self, number: int) -> Example:
        """One sample, or a hole of its planned length if it cannot be read: the plan never shifts."""
        sample, length = self.index.samples[number], self.index.lengths[number]
        try:
            example = self.processor(sample, max_length=length)
        except ValueError as error:
            return hole(sample, length, str(error), torch.empty(0, *self.processor.pixel_shape))
        assert len(example.input_ids) == length, (
            f"{sample.where}: planned {length}, got {len(example.input_ids)} tokens"
        )
        return example


def hole(sample: Sample, length: int, fault: str, no_pixels: torch.Tensor) -> Example:
    """Tokens without labels and without an image in the place of a sample that cannot be read."""
    return Example(
        sample.id, [0] * length, [IGNORE_INDEX] * length, no_pixels, sample.where, f"{sample.where}: {fault}"
    )


def batches(dataset: PlannedBatches, first_step: int, last_step: int, num_workers: int) -> Iterator[Batch]:
    """The micro-batches of this rank from `first_step` up to, not including, `last_step`."""
    items = range(first_step * dataset.accumulation, last_step * dataset.accumulation)
    loader = DataLoader(
        dataset,
        batch_size=None,
        sampler=items,
        num_workers=num_workers,
        persistent_workers=False,
        pin_memory=torch.cuda.is_available(),
    )
    return iter(loader)
