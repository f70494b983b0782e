"""What is measured of a sample: its words always, its images as far as a rule asks.

Enters: samples, in blocks of records that follow each other. Leaves: a line of scores for each, or of what is wrong
with it. A block is the same whoever measures it, with whatever else: so the scores of one rank are those of eight.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch.utils.data import Dataset

from mllm.data.curation.filters.look import look
from mllm.data.curation.filters.size import measure_sizes
from mllm.data.curation.filters.text import measure_text
from mllm.data.formats.source import Place, Source
from mllm.data.images import image_size, open_image
from mllm.types import ImageSource, Sample

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

TEXT, SIZE, LOOK = "text", "size", "look"
"""Kinds of measurement; any other is a model that scores image and words."""
REMEMBERED = 4096
"""Pictures whose look is kept by name: records about one picture follow each other."""
DRAFT = 256
"""Least side that a look is taken of: a large JPEG is decoded at a fraction of its size."""

Line = dict[str, Any]
See = Callable[["Image"], Mapping[str, "Tensor"]]
"""An image to what a scoring model wants of it, each [1, ...]."""


@dataclass
class Block:
    """Some samples in a row, measured, and what a model has yet to score."""

    number: int
    lines: list[Line]
    texts: list[str] = field(default_factory=list)
    """What is said of each image."""
    seen: list[Mapping[str, Tensor]] = field(default_factory=list)
    """The images."""
    owners: list[int] = field(default_factory=list)
    """The line of each image."""


class Blocks(Dataset[Block]):
    """The blocks of a source, each measured when it is asked for."""

    def __init__(self, source: Source, places: np.ndarray, size: int, kinds: Iterable[str], see: See | None) -> None:
        """`places` are those of `record_list`; `size` records are a block."""
        self.source, self.places, self.size, self.see = source, places, size, see
        self.kinds = frozenset(kinds)
        self.looks = Looks()

    def __len__(self) -> int:
        return -(-len(self.places) // self.size)

    def __getitem__(self, number: int) -> Block:
        block = Block(number, [])
        for shard, start, size, row, parts in self.places[number * self.size : (number + 1) * self.size].tolist():
            for part in range(parts):
                self.add(block, Place(shard, start, size, row, part))
        return block

    def add(self, block: Block, place: Place) -> None:
        """One more line."""
        where = self.source.origin(place.shard, place.row).where
        line: Line = {"id": None, "where": where, "shard": place.shard, "row": place.row, "part": place.part}
        kind = "record"
        try:
            sample = self.source.fetch(place)
            text = said(sample)
            line |= {"id": sample.id, **measure_text(text)}
            kind = "image"
            if SIZE in self.kinds:
                line |= measure_sizes([image_size(image) for image in sample.images])
            if LOOK in self.kinds:
                line["looks"] = [[name_of(image), self.looks(image)] for image in sample.images]
            seen = [self.see(open_image(image)) for image in sample.images] if self.see else []
        except ValueError as error:
            line |= {"fault": kind, "cause": str(error).removeprefix(f"{where}: ")}
        else:
            block.seen += seen
            block.texts += [text] * len(seen)
            block.owners += [len(block.lines)] * len(seen)
        block.lines.append(line)


def said(sample: Sample) -> str:
    """All that the assistant says: a caption, or the answers of a conversation."""
    return "\n".join(message.text.strip() for message in sample.messages if message.role == "assistant")


def name_of(image: ImageSource) -> str | None:
    """What tells a picture from another before it is looked at; nothing for bytes, which have no name."""
    return str(image) if isinstance(image, str | Path) else None


class Looks:
    """Looks as text, the last ones remembered by name."""

    def __init__(self) -> None:
        self.known: dict[str, str] = {}

    def __call__(self, image: ImageSource) -> str:
        name = name_of(image)
        if name in self.known:
            return self.known[name]
        found = base64.b64encode(look(open_image(image, DRAFT))).decode()
        if name is not None:
            if len(self.known) == REMEMBERED:
                self.known.clear()
            self.known[name] = found
        return found
