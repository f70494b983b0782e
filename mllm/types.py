"""The words of the route, from a record on disk to the tensors of one micro-batch.

A `Sample` is what a reader found (messages and images, nothing opened); an `Example` is one sample as the model sees
it (tokens, labels, pixels); a `Row` is several examples side by side in `seq_length` tokens; a `Batch` is rows
stacked.

Shapes: B rows of a micro-batch, S tokens of a row, T tokens of an example, N images, V visual tokens an image, H W
pixels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, TypedDict

if TYPE_CHECKING:
    import PIL.Image
    from torch import Tensor

ImageSource: TypeAlias = "str | Path | bytes | PIL.Image.Image | Mapping[str, Any] | Video | Frame"
"""What an image may be named by: a path, a URL or data URI, `ARCHIVE.zip::MEMBER`, the file's bytes, the picture
itself, a mapping of `bytes` and `path`; and the place of a video, or a frame of one."""


@dataclass(frozen=True)
class Video:
    """One video among the images of a `Sample`; the processor puts frames in its place."""

    source: ImageSource | tuple[ImageSource, ...]
    """A file, a folder of images, or the images of its frames in order."""

    def __str__(self) -> str:
        if isinstance(self.source, bytes | tuple):
            return f"({len(self.source)} {'bytes' if isinstance(self.source, bytes) else 'frames'})"
        return str(self.source)


@dataclass(frozen=True)
class Frame:
    """One of the frames of a video that are looked at: the `number`-th, from 0, of so many."""

    video: Video
    number: int
    of: int

    def __str__(self) -> str:
        return f"{self.video} (frame {self.number + 1} of {self.of})"


IGNORE_INDEX = -100
"""A label that carries no loss. Labels are never shifted in data: the loss shifts."""

IMAGE_TOKEN = "<image>"
"""One placeholder an image in text; the processor makes it V placeholders wide, the model overwrites them."""


@dataclass(frozen=True)
class Normalisation:
    """What makes float32 of uint8 pixels: (pixel * scale - mean) / std, with a mean and std for each channel.

    The data side leaves it to the device that runs the encoder. In the order in which transformers' image processors
    compute, so that the result is theirs.
    """

    scale: float
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    @classmethod
    def of(cls, image_processor: Any) -> Normalisation:
        """That of an image processor, which may leave out either step."""
        scale = image_processor.rescale_factor if getattr(image_processor, "do_rescale", False) else 1.0
        if not getattr(image_processor, "do_normalize", False):
            return cls(float(scale), (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
        return cls(float(scale), channels(image_processor.image_mean), channels(image_processor.image_std))

    def __call__(self, pixels: Tensor) -> Tensor:
        """[N, 3, H, W] uint8 -> float32."""
        normal = pixels.float()
        for channel, (mean, std) in enumerate(zip(self.mean, self.std, strict=True)):
            # plain numbers, no buffers: nothing casts them to bfloat16, and nothing waits for a copy to the device
            normal[:, channel].mul_(self.scale).sub_(mean).div_(std)
        return normal


def channels(values: float | Sequence[float]) -> tuple[float, float, float]:
    """One number a channel, where one may stand for all three."""
    red, green, blue = values if isinstance(values, Sequence) else (values,) * 3
    return float(red), float(green), float(blue)


class Mark(Enum):
    """What may stand between the words of a message."""

    IMAGE = "image"


@dataclass
class Message:
    """One turn. `content` is words and, where an image stands, `Mark.IMAGE`."""

    role: str
    """`system`, `user` or `assistant`."""
    content: list[str | Mark]

    @property
    def text(self) -> str:
        """The words alone, without the images between them."""
        return "".join(part for part in self.content if isinstance(part, str))

    @property
    def num_images(self) -> int:
        return self.content.count(Mark.IMAGE)


@dataclass
class Sample:
    """One record of a source. Images are named, not opened."""

    id: str
    """Stable over epochs, workers, ranks and resume."""
    messages: list[Message]
    images: list[ImageSource] = field(default_factory=list)
    where: str = ""
    """File and row, for every error that concerns this sample."""
    meta: Mapping[str, Any] = field(default_factory=dict)
    """What else the record held, e.g. the type of a question."""
    variant: str = ""
    """Which kind of caption this is, where a record holds several of which one is used an epoch."""


@dataclass(frozen=True)
class Fault:
    """Why a record, or a sample of it, is not learned from."""

    kind: str
    """Its class: `record`, `image`, `text`, `length`, `changed` or `filtered`."""
    id: str
    """The sample's; empty where the record could not be read so far."""
    where: str
    """File and row."""
    cause: str
    number: int = -1
    """The sample's number in the index; -1 where it has none, because the index left it out."""

    def __str__(self) -> str:
        return f"{self.where}: {self.cause}"


@dataclass
class Example:
    """One sample as the model sees it: `input_ids` and `labels` [T], `pixel_values` [n, 3, H, W] (n may be 0).

    Pixels are uint8 and await their `Normalisation` on the device; float32 only where the encoder's image processor
    cannot be split so.
    """

    id: str
    input_ids: list[int]
    labels: list[int]
    pixel_values: Tensor
    where: str = ""
    source: int = 0
    """Number of its source among `data.sources`."""
    fault: Fault | None = None
    """Why this is a hole: the sample could not be read, and its place carries no labels and no image."""
    instructions: list[list[int]] = field(default_factory=list)
    """[n] lists of tokens: the words of the turn in which each image stands; empty where no connector reads them."""
    image_sizes: list[tuple[int, int]] = field(default_factory=list)
    """Height and width of each image whose tiles are laid out by them (`data.tiles: anyres`); else empty."""


@dataclass
class Row:
    """Examples side by side: `input_ids`, `labels`, `position_ids` [S] int64, `pixel_values` [n, 3, H, W] in order."""

    input_ids: Tensor
    labels: Tensor
    position_ids: Tensor
    pixel_values: Tensor
    sample_ids: list[str]
    where: list[str]
    sources: list[int] = field(default_factory=list)
    """Of each example the number of its source."""
    instructions: list[list[int]] = field(default_factory=list)
    """Of each image, where a connector reads them."""
    faults: list[Fault] = field(default_factory=list)
    image_sizes: list[tuple[int, int]] = field(default_factory=list)
    """Of each image, where its tiles are laid out by them."""


class Batch(TypedDict):
    """One micro-batch. No attention mask: `position_ids` that restart tell the model where a sample ends.

    `pixel_values` is never empty: where no row has an image it holds one blank image, and `num_images` is 0.
    """

    input_ids: Tensor  # [B, S] int64
    labels: Tensor  # [B, S] int64, IGNORE_INDEX where no loss
    position_ids: Tensor  # [B, S] int64, 0 at each sample's first token
    pixel_values: Tensor  # [max(N, 1), 3, H, W] uint8, to be normalised on the device; float is normalised already
    num_images: int  # N
    row_images: list[int]  # of them, those of each row
    instruction_ids: Tensor | None  # [N, T] int64, -1 behind the last; None where there is none, or nobody reads them
    image_sizes: list[list[tuple[int, int]]]  # per row, height and width of each image that is laid out by them
    sample_ids: list[list[str]]  # per row, in order
    where: list[str]  # file and row of each sample
    sources: list[list[int]]  # per row, of each sample the number of its source
    faults: list[Fault]  # samples that could not be read: each is a hole of its planned length, without labels
