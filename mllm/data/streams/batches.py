"""Training without an index: sources are read while the run goes on.

Enters: the settings of the data, a processor. Leaves: a `Stream`, what its first samples look like (`look`), and for
a rank the micro-batches of its plan (`StreamedBatches`).

Sources are read one after the other, in the order in which they and their records lie, and from the beginning again
when all have ended; where the mixture gives them weights, each for itself. Nothing is shuffled. Every rank reads and
tokenises everything, in the process that trains, and keeps its own rows: workers only open the images. A resume reads
the shard at which it stands from its beginning, without tokenising. Where an index can be made, it is the better way.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice, takewhile
from typing import Any

import numpy as np

from mllm.data.collate import collate
from mllm.data.indexing.tally import Tally
from mllm.data.loader import Batches, DataConfig, Share, hole
from mllm.data.packing import join
from mllm.data.planning.mixture import MixtureConfig
from mllm.data.processor import Processor
from mllm.data.streams.plan import Item, StreamPlan
from mllm.data.streams.reader import Stream, mute
from mllm.types import IGNORE_INDEX, Batch, Example, Fault, Sample

LOOKED_AT = 200
"""Samples that are read before the first step, to see whether the labels make sense."""


def open_stream(data: DataConfig, processor: Processor, seed: int) -> Stream:
    """The sources as a stream; files that are far away are fetched here.

    Raises:
        ValueError: a setting means nothing in a stream.
    """
    if data.keep_in_memory:
        raise ValueError("data.keep_in_memory is for small sets that are seen many times: not with data.stream")
    for source in data.sources:
        source.shards()
    weights = stream_weights(data.mixture, len(data.sources))
    return Stream(list(data.sources), processor, data.seq_length, data.max_bad_share, weights, seed)


def stream_weights(mixture: MixtureConfig, sources: int) -> list[float] | None:
    """The weights of all sources, or None where none has one.

    Raises:
        ValueError: some have none, all are 0, or the mixture asks for what needs counts.
    """
    shares = mixture.shares
    if mixture.temperature != 1 or any(share.repeat is not None or share.max_passes is not None for share in shares):
        raise ValueError(
            "data.stream mixes by weights alone: repeat, max_passes and temperature need counts, which an index has"
        )
    weights = [share.weight for share in shares if share.weight is not None]
    if not weights:
        return None
    if len(weights) < sources or len(shares) != sources or not any(weights):
        raise ValueError(f"{len(weights)} weights for {sources} data.sources: give each one, and one of them above 0")
    return weights


@dataclass(frozen=True)
class Look:
    """The first samples of a stream, with the columns that an index has."""

    items: list[Item]

    @property
    def length(self) -> np.ndarray:
        return np.array([item.length for item in self.items])

    @property
    def supervised(self) -> np.ndarray:
        """Tokens that carry a loss: the first one of a sample never does."""
        return np.array([item.length - 1 - item.tokens[1][1:].count(IGNORE_INDEX) for item in self.items])

    @property
    def num_images(self) -> int:
        return int(self.images.sum())

    @property
    def images(self) -> np.ndarray:
        return np.array([item.images for item in self.items])

    @property
    def tiles(self) -> np.ndarray:
        return np.array([item.tiles for item in self.items])

    def sample(self, number: int) -> Sample:
        sample = self.items[number].sample
        assert sample is not None
        return sample


def look(stream: Stream) -> Look:
    """The first samples of the first pass; the run reads them again, and only then are they counted.

    Raises:
        ValueError: none can be used, or a hundred in a row cannot.
    """
    feeds, _ = replace(stream, tally=Tally(streamed=True), tell=mute, last=[]).feeds()
    items: list[Item] = []
    for feed in feeds:
        first_pass = takewhile(lambda item: item.spot.turn == 0, feed.read(None))
        items += islice(first_pass, -(-LOOKED_AT // len(feeds)))
    return Look(items)


class StreamedBatches(Batches):
    """The micro-batches of this rank. The process that trains reads (`items`); a worker gets rows of samples with
    their tokens, and opens their images."""

    def __init__(self, plan: StreamPlan, processor: Processor, share: Share) -> None:
        self.plan, self.processor, self.share = plan, processor, share
        self.accumulation = share.accumulation(plan.rows_per_step)

    def items(self, first_step: int, last_step: int) -> Iterator[list[list[Item]]]:
        """The rows of each micro-batch, step by step."""
        for step in range(first_step, last_step):
            yield from self.share.micro_batches(self.plan.items(step))

    def names(self, rows: list[list[Item]]) -> Iterator[str]:
        """Sample ids of one of the items."""
        return (item.id for row in rows for item in row)

    def __getitem__(self, rows: list[list[Item]]) -> Batch:
        shape = self.processor.pixel_shape
        examples = [join([self.example(item) for item in row], shape) for row in rows]
        return collate(examples, shape, self.share.row_length)

    def example(self, item: Item) -> Example:
        """One sample, or a hole of its length if an image cannot be opened."""
        sample = item.sample
        assert sample is not None
        try:
            return self.processor.example(sample, *item.tokens, item.spot.source)
        except ValueError as error:
            fault = Fault("image", item.id, sample.where, str(error).removeprefix(f"{sample.where}: "), item.number)
            return hole(fault, item.length, item.spot.source, self.processor.pixels([]))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "plan": None}
