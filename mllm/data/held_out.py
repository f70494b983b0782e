"""The samples that are asked and never learned from, as batches with a second set of images: those of other samples.

Enters: the index of what is held out. Leaves: the micro-batches of one rank, as many as of every other rank, each with
the right images and with borrowed ones in the same slots: of images cut into tiles, of another one with as many, so
that nothing else changes.

N images, H W pixels.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from mllm.data.collate import collate, stack_pixels
from mllm.data.index import Index, build_index
from mllm.data.loader import DataConfig, Examples, Share, hole
from mllm.data.other_pictures import Picture, lenders, picture
from mllm.data.packing import join, pack
from mllm.data.processor import Processor
from mllm.data.streams.reader import Stream
from mllm.data.workers import read_ahead
from mllm.types import Batch, Example, Fault, ImageSource

SEED = 0
"""Of who borrows from whom: the same in every run, so that runs can be compared."""


class Asked(NamedTuple):
    """One micro-batch, asked more than once."""

    batch: Batch
    borrowed: Tensor
    """[max(N, 1), 3, H, W]: in the place of each image that of another sample."""
    changed: Tensor
    """[samples] bool: whether the images of that sample are other ones now."""


def index_held_out(
    index: Index | Stream, data: DataConfig, processor: Processor, workers: int = 0, folder: Path | None = None
) -> None:
    """Give the index of the training samples that of `data.held_out`, where it lists sources.

    Raises:
        ValueError: a stream cannot hold out a number; a source is learned from as well; too many samples are bad.
    """
    if isinstance(data.held_out, int) and isinstance(index, Stream):
        raise ValueError("data.held_out is a number, and data.stream does not count: list sources under data.held_out")
    if not isinstance(data.held_out, list):
        return
    places = [(str(source.path), source.split, source.subset) for source in data.sources]
    for source in data.held_out:
        if (str(source.path), source.split, source.subset) in places:
            raise ValueError(
                f"{source.path} stands under data.sources and under data.held_out: what is held out is never learned "
                f"from; list another file, or give data.held_out a number of samples to take out"
            )
    index.held_out = build_index(data.held_out, processor, data.seq_length, workers, folder, progress=False)
    index.held_out.check(data.max_bad_share)


class HeldOutBatches(Dataset[Asked]):
    """The micro-batches of this rank; the rows that are missing to make them even are empty ones."""

    def __init__(self, index: Index, processor: Processor, data: DataConfig, share: Share) -> None:
        self.examples, self.shape = Examples(index, processor), processor.pixel_shape
        self.row_length = share.row_length
        lengths = index.length.tolist()
        rows = pack(lengths, data.seq_length) if data.packing else [[number] for number in range(len(lengths))]
        rows += [[]] * (-len(rows) % (share.rows * share.world_size))
        self.items = list(share.micro_batches(rows))
        self.lender = lenders([self.picture(number) for number in range(len(index))], SEED, self.tiles(index))

    @property
    def num_changed(self) -> int:
        """Samples that can borrow other images."""
        return sum(number is not None for number in self.lender)

    def tiles(self, index: Index) -> list[tuple[Any, ...]]:
        """Of each sample the tiles of each of its images, and how they are laid out: only who has the same can lend."""
        of_size = self.examples.processor.slots.seen_as
        sizes = (sides for sides in index.sizes.to_pylist())
        return [tuple(map(of_size, sides[::2], sides[1::2])) for sides in sizes]

    def picture(self, number: int) -> Picture:
        """What is seen in a sample; nothing, where it cannot be read."""
        try:
            return picture(self.images(number))
        except ValueError:
            return ()

    def images(self, number: int) -> list[ImageSource]:
        """Those of a sample's images that stand in its tokens, which may be cut."""
        return self.examples.sample(number).images[: int(self.examples.index.images[number])]

    def __getitem__(self, rows: list[list[int]]) -> Asked:
        pairs = [[self.pair(number) for number in row] for row in rows]
        joined = [join([example for example, _ in row], self.shape) for row in pairs]
        batch = collate(joined, self.shape, self.row_length)
        borrowed = [pixels for row in pairs for _, pixels in row]
        changed = [self.lender[number] is not None for row in rows for number in row]
        pixels = stack_pixels(borrowed, self.shape) if borrowed else batch["pixel_values"]
        return Asked(batch, pixels, torch.tensor(changed, dtype=torch.bool))

    def pair(self, number: int) -> tuple[Example, Tensor]:
        """The sample and the images it borrows; a hole, with neither, if one of the two cannot be read."""
        example, lender = self.examples.example(number), self.lender[number]
        if example.fault or lender is None:
            return example, example.pixel_values
        processor = self.examples.processor
        try:
            return example, processor.pixels(self.images(lender))
        except ValueError as error:
            none = processor.pixels([])
            fault = Fault("image", example.id, example.where, str(error), number)
            return hole(fault, len(example.input_ids), example.source, none), none

    def read(self, num_workers: int) -> Iterator[Asked]:
        """All micro-batches of this rank."""
        return read_ahead(self, self.items, num_workers)
