"""Planned rows become batches, on any rank, in any worker.

Enters: an index, a plan and this rank's place. Leaves: the micro-batches of this rank from the step on that is asked
for. The plan says which samples; here they are read, wherever they lie, and what cannot be read becomes a hole of its
planned length. Nothing draws a random number.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, TypeVar

import torch
from pydantic import Discriminator, Tag
from torch.utils.data import Dataset

from mllm.data.collate import collate
from mllm.data.formats import SourceConfig
from mllm.data.imaging.slots import ImageFit
from mllm.data.imaging.tiling import Tiles
from mllm.data.index import Index
from mllm.data.packing import join
from mllm.data.plan import Plan
from mllm.data.planning.mixture import MixtureConfig
from mllm.data.processor import Processor
from mllm.data.talk.markers import ImageMarkers
from mllm.data.workers import read_ahead
from mllm.schema import Fraction, NotNegativeInt, Positive, Schema
from mllm.types import IGNORE_INDEX, Batch, Example, Fault, Sample

T = TypeVar("T")
HeldOutConfig = Annotated[
    Annotated[Positive, Tag("number")] | Annotated[list[SourceConfig], Tag("sources")],
    Discriminator(lambda given: "sources" if isinstance(given, list) else "number"),
]


@dataclass
class DataConfig(Schema):
    """What is learned from, and how it is laid out in rows."""

    sources: list[SourceConfig] = field(default_factory=list)
    """Files of records, each with its `format`."""
    held_out: HeldOutConfig | None = None
    """What is asked while the run goes on, and never learned from: a number of samples, which are taken out of the
    sources by the hash of their ids, or sources of their own. See `train.eval_every`."""
    mixture: MixtureConfig = field(default_factory=MixtureConfig)
    """How much of each source an epoch draws; every sample once where nothing is set."""
    seq_length: Positive = 2048
    """Tokens of a row; longer samples are cut, in front of an image that would not fit."""
    stream: bool = False
    """Read the sources in their order while the run goes on, and never count them: for what is too much to index.
    Needs `train.steps`, and files that lie shuffled; of the mixture, weights alone."""
    packing: bool = True
    """Several samples a row, isolated from each other; without it, one sample a row, padded to the longest."""
    image_fit: ImageFit = "native"
    """`native`: what the encoder's own image processor does. `pad`: pad to a square with the mean colour first.
    `crop`: the square in the middle. `resize`: squeeze to a square. `aspect`: a grid of patches in its own aspect, each
    a visual token (SigLIP2 NaFlex with a linear or mlp connector)."""
    tiles: Tiles = "none"
    """An image as several tiles with the whole picture beside them: `anyres` (LLaVA-NeXT: aspect kept on black, no
    tokens for the border, a learned newline behind each row) or `dynamic` (InternVL: nearest aspect, squeezed, each
    tile as many visual tokens as an image has)."""
    max_tiles: Positive | None = None
    """Of one image, the whole picture not counted: 12 for `dynamic`, LLaVA-NeXT's five grids of up to 4 for `anyres`,
    where nothing is set."""
    image_markers: ImageMarkers = "none"
    """`numbered`: "(image 1: <Image>", the image, "</Image>)", counted over the conversation, as Mantis has it."""
    video_frames: Positive = 8
    """Images that a video becomes: the middles of so many equal segments of it, or each frame of a shorter one."""
    jpeg_draft: bool = False
    """Decode a JPEG of twice the needed size or more at a fraction of it: much faster, slightly other pixels."""
    num_workers: NotNegativeInt = 2
    """Processes that read and decode ahead, and that index; 0 does it in the training process."""
    keep_in_memory: bool = False
    """Each worker keeps samples, tokens and pixels after the first time; for small sets that are seen many times."""
    max_bad_share: Fraction = 0.001
    """Share of samples that may be unusable before the run stops. They are named in quarantine.jsonl either way."""
    index_dir: Path | None = None
    """Where the counts of all files are kept, for every run that reads the same files; a folder in $MLLM_CACHE, or in
    ~/.cache/mllm, where it is not set."""

    def __post_init__(self) -> None:
        named, shares = len(self.sources), len(self.mixture.shares)
        if named and shares and named != shares:
            raise ValueError(f"mixture.shares has {shares} entries for {named} sources: give one for each, or none")


@dataclass(frozen=True)
class Share:
    """The part of each step that is this rank's: row r of a step belongs to rank r % world_size."""

    rank: int
    world_size: int
    rows: int
    """Rows of one micro-batch on this rank."""
    row_length: int | None = None
    """Tokens that every row is filled up to; those of the longest of its micro-batch, where it is not set."""

    def accumulation(self, rows_per_step: int) -> int:
        """Micro-batches of this rank in a step; a `ValueError` where they do not come out even."""
        together = self.rows * self.world_size
        if rows_per_step % together:
            raise ValueError(
                f"train.rows_per_step {rows_per_step} is no multiple of {self.world_size} ranks x "
                f"{self.rows} rows_per_micro_batch: change one of them"
            )
        return rows_per_step // together

    def micro_batches(self, rows: list[T]) -> Iterator[list[T]]:
        """This rank's part of the rows of a step."""
        mine = rows[self.rank :: self.world_size]
        for start in range(0, len(mine), self.rows):
            yield mine[start : start + self.rows]


class Examples:
    """The samples of an index, as the model sees them."""

    def __init__(self, index: Index, processor: Processor) -> None:
        self.index, self.processor = index, processor
        self.kept: dict[int, Sample] = {}

    def example(self, number: int) -> Example:
        """One sample, or a hole of its planned length if it cannot be read: the plan never shifts."""
        length, source, kind = int(self.index.length[number]), int(self.index.source[number]), "record"
        try:
            sample = self.sample(number)
            kind = "text"
            input_ids, labels = self.processor.tokens(sample, self.index.max_length)
            kind = "changed"
            if len(input_ids) != length:
                raise ValueError(f"{len(input_ids)} tokens, {length} when it was indexed: the file changed")
            kind = "image"
            return self.processor.example(sample, input_ids, labels, source)
        except ValueError as error:
            where = self.index.where(number)
            kind = getattr(error, "kind", kind)
            fault = Fault(kind, self.index.id(number), where, str(error).removeprefix(f"{where}: "), number)
            return hole(fault, length, source, self.processor.pixels([]))

    def sample(self, number: int) -> Sample:
        """Read from its place, or kept from the last time."""
        if number in self.kept:
            return self.kept[number]
        sample = self.processor.framed(self.index.sample(number))
        if self.processor.keep:
            self.kept[number] = sample
        return sample

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "kept": {}}


class Batches(Dataset[Batch], ABC):
    """What both ways of reading have: planned rows over an index here, and streamed ones."""

    @abstractmethod
    def items(self, first_step: int, last_step: int) -> Iterator[Any]:
        """The rows of each micro-batch, step by step."""

    @abstractmethod
    def names(self, rows: Any) -> Iterator[str]:
        """Sample ids of one of the items."""


class PlannedBatches(Examples, Batches):
    """The micro-batches of this rank. The process that trains plans (`items`); a worker gets rows of sample numbers
    and needs the index alone to fill them."""

    def __init__(self, index: Index, plan: Plan, processor: Processor, share: Share) -> None:
        super().__init__(index, processor)
        self.plan, self.share = plan, share
        self.accumulation = share.accumulation(plan.rows_per_step)

    def items(self, first_step: int, last_step: int) -> Iterator[list[list[int]]]:
        """The rows of each micro-batch, step by step."""
        for step in range(first_step, last_step):
            yield from self.share.micro_batches(self.plan.rows(step))

    def names(self, rows: list[list[int]]) -> Iterator[str]:
        """Sample ids of one of the items."""
        return (self.index.id(number) for row in rows for number in row)

    def __getitem__(self, rows: list[list[int]]) -> Batch:
        shape = self.processor.pixel_shape
        examples = [join([self.example(number) for number in row], shape) for row in rows]
        return collate(examples, shape, self.share.row_length)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "plan": None}


def hole(fault: Fault, length: int, source: int, no_pixels: torch.Tensor) -> Example:
    """Tokens without labels and without an image in the place of a sample that cannot be read."""
    return Example(fault.id, [0] * length, [IGNORE_INDEX] * length, no_pixels, fault.where, source, fault)


def batches(
    dataset: Batches,
    first_step: int,
    last_step: int,
    num_workers: int,
    asked: Callable[..., Iterator[Any]] | None = None,
) -> Iterator[Batch]:
    """The micro-batches of this rank from `first_step` up to, not including, `last_step`. `asked` is handed the items
    as they are asked for, with the way to their sample ids, and gives them on."""
    items: Iterator[Any] = dataset.items(first_step, last_step)
    items = asked(items, dataset.names) if asked else items
    return read_ahead(dataset, items, num_workers, pin_memory=torch.cuda.is_available())
