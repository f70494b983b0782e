"""What a training step is measured on: an index and a processor of samples that are drawn when they are asked for.

Enters: a mix of lengths, the sizes of a picture and of the vocabulary. Leaves: an `Index` and the processor that goes
with it, for the product's own plan, loader and loop. No tokenizer and no file: token ids are spread over the whole
vocabulary, pixels are noise, and both hang on the sample's number alone.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from benchmarks.mixes import conversations
from mllm.data.index import Index
from mllm.types import IGNORE_INDEX, Example, Sample

PICTURES = 64
"""Different ones; a sample has the one that its number says."""
TEMPLATE = 6
"""Tokens of a caption's text that the template adds and nobody learns."""
SHORTEST = 4
"""Tokens of a text, however it is shrunk."""
SUPERVISED = {"captions": lambda text: np.maximum(1, text - TEMPLATE), "instruct": lambda text: text // 2}
"""Tokens of the answers: all of a caption, half of a conversation."""


@dataclass(frozen=True)
class Drawing:
    """What is drawn."""

    kind: str
    """`captions` or `instruct`, see `mixes.CONVERSATIONS`."""
    visual_tokens: int
    side: int
    """Pixels along a side of a picture."""
    vocabulary: int
    """Its last token is the placeholder."""
    samples: int = 4096
    seed: int = 0
    shrink: int = 1
    """Texts are so many times shorter than in the mix: for a CPU, with as many times fewer visual tokens."""


class DrawnProcessor:
    """Stands where `data/processor.py` stands: tokens and pixels of a sample by its number."""

    keep = False

    def __init__(self, drawing: Drawing) -> None:
        self.num_visual_tokens, self.image_token_id = drawing.visual_tokens, drawing.vocabulary - 1
        self.pixel_shape = (3, drawing.side, drawing.side)
        self.drawing = drawing
        shape = (PICTURES, *self.pixel_shape)  # drawn here, so that forked workers share them
        self.pictures = torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
        text, self.has_image = conversations(drawing.kind, drawing.samples, drawing.seed)
        self.text = np.maximum(SHORTEST, text // drawing.shrink)
        self.supervised = SUPERVISED[drawing.kind](self.text)

    def framed(self, sample: Sample) -> Sample:
        """There are no videos among the drawn samples."""
        return sample

    def tokens(self, sample: Sample, max_length: int | None = None) -> tuple[list[int], list[int]]:
        """[T] twice: the image in front, the answer at the end."""
        number = int(sample.id)
        text, visual = int(self.text[number]), self.num_visual_tokens * int(self.has_image[number])
        drawn = np.random.default_rng((self.drawing.seed, number)).integers(0, self.image_token_id, text).tolist()
        answer = int(self.supervised[number])
        hidden = [IGNORE_INDEX] * (visual + text - answer)
        return [self.image_token_id] * visual + drawn, hidden + drawn[text - answer :]

    def example(self, sample: Sample, input_ids: list[int], labels: list[int], source: int = 0) -> Example:
        return Example(sample.id, input_ids, labels, self.pixels(sample.images), sample.where, source)

    def pixels(self, images: list[Any]) -> Tensor:
        """[n, 3, H, W] uint8 of pictures by number; n may be 0."""
        return self.pictures[[int(number) for number in images]]


class DrawnIndex(Index):
    """An index whose samples lie nowhere."""

    def sample(self, number: int) -> Sample:
        """Images are numbers of pictures."""
        return Sample(self.id(number), [], [number % PICTURES] * int(self.images[number]), self.where(number))

    def where(self, number: int) -> str:
        return f"drawn, number {number}"


def draw(drawing: Drawing) -> tuple[DrawnIndex, DrawnProcessor]:
    """Both; equal for equal drawings."""
    processor = DrawnProcessor(drawing)
    number, images = drawing.samples, processor.has_image.astype(np.int32)
    length = (processor.text + processor.num_visual_tokens * images).astype(np.int32)
    none = np.zeros(number, np.int32)
    index = DrawnIndex(
        sources=[],
        max_length=int(length.max()),
        ids=pa.array(map(str, range(number)), pa.large_string()),
        length=length,
        supervised=processor.supervised.astype(np.int32),
        images=images,
        tiles=images,
        source=none.astype(np.int16),
        group=np.arange(number),
        weight=np.ones(number, np.float32),
        shard=none,
        start=none,
        size=none,
        row=none,
        part=none,
        sizes=pa.array([[]] * number, pa.list_(pa.int32())),
        truncated=none[:0],
        tokens_cut=0,
        faults=[],
        filtered=Counter(),
    )
    return index, processor
