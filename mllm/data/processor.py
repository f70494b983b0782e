"""One sample to what the model sees. Training, chat and evaluation share this door: there is no second prompt
builder.

Enters: a `Sample`. Leaves: an `Example`, `pixel_values` [n, 3, H, W] uint8 (the device normalises them), `input_ids`
and `labels` [T] in which each image's placeholder is V slots wide, or V for each of its tiles, or as many as its size
asks for (`any_resolution.py`). How many visual tokens an image or tile becomes is told by the model side, from config
alone; how many tiles, by the image's header.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from PIL import Image, ImageOps

from mllm.any_resolution import AnyResolution
from mllm.data import chat
from mllm.data.images import image_size, open_image
from mllm.data.imaging.frames import with_frames
from mllm.data.imaging.pixels import as_bytes, cheapest_way, in_patches, least_side, squared
from mllm.data.imaging.tiling import Tiles, Tiling
from mllm.data.talk.markers import NUMBERED, ImageMarkers, marked
from mllm.image_processor import load_image_processor
from mllm.native_aspect import NativeAspect
from mllm.types import IGNORE_INDEX, IMAGE_TOKEN, Example, ImageSource, Message, Sample

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

ImageFit = Literal["native", "pad", "crop", "resize", "aspect"]
FACTS = (
    *("num_visual_tokens", "image_fit", "jpeg_draft", "instruct", "image_markers", "tiles", "max_tiles", "patch"),
    "video_frames",
)
"""What a saved processor holds beside its tokenizer and image processor."""
LONGEST_INSTRUCTION = 128
"""Tokens of an instruction that a connector reads, the last ones: as many as InstructBLIP's released code."""
LARGEST_SIDE = 4096
"""An image is shrunk to this before it is padded: more than any encoder sees, and its square fits in memory."""


class TooLong(ValueError):
    """Nothing is left to learn of a sample that was cut."""

    kind = "length"


class Unreadable(ValueError):
    """An image has no size, so that nobody can say how many tiles it becomes."""

    kind = "image"


class Taken(NamedTuple):
    """What one image takes."""

    tiles: int
    """Of the encoder."""
    tokens: int
    """Of the text: its slots."""


@dataclass(frozen=True)
class Encoded:
    """A sample in tokens, as much of it as fits."""

    input_ids: list[int]
    labels: list[int]
    images: int
    """So many of the sample's images stand in them, its first ones; those behind the cut are never opened."""
    tiles: int
    """What the encoder is handed for these images: one for each, or its tiles."""
    cut: int = 0
    """Tokens that cutting took away; of an image behind the cut, as many as of one tile."""


@dataclass
class Processor:
    """Tokenizer, image processor and the number of visual tokens an image becomes."""

    tokenizer: PreTrainedTokenizerBase
    image_processor: Any
    num_visual_tokens: int
    """V: slots that each image's placeholder becomes, or each tile of it."""
    image_fit: ImageFit = "native"
    """`native`: what the encoder's own image processor does (CLIP: shortest edge, centre crop). `pad`: first pad to a
    square with the mean colour, so that nothing is cut (LLaVA-1.5, second stage). `crop`: the square in its middle.
    `resize`: squeezed to a square. `aspect`: as many patches in its own aspect as a square has at most."""
    keep: bool = False
    """Keep the tokens of samples and the pixels of image files after the first time: for small sets seen many times."""
    jpeg_draft: bool = False
    """Decode JPEGs at least twice as large as needed at a fraction of their size: faster, slightly other pixels."""
    instruct: bool = False
    """Hand the words around each image to the connector too."""
    image_markers: ImageMarkers = "none"
    """`numbered`: words around each image that number it, see `talk/markers.py`."""
    tiles: Tiles = "none"
    """An image as several tiles of V visual tokens, without its border in `anyres`, see `imaging/tiling.py`."""
    max_tiles: int | None = None
    """Of one image, without the whole picture beside them."""
    patch: int | None = None
    """Pixels along a side of the encoder's patches, which `aspect` must know."""
    video_frames: int = 8
    """Images that a video becomes, at most, see `imaging/frames.py`."""

    def __post_init__(self) -> None:
        chat.ensure_template(self.tokenizer)
        if IMAGE_TOKEN not in self.tokenizer.get_vocab():
            self.tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE_TOKEN]})
        self.kept_pixels: dict[str, Tensor] = {}
        self.kept_tokens: dict[tuple[str, int | None], tuple[list[int], list[int]]] = {}
        self.image_token_id = self.tokenizer.get_vocab()[IMAGE_TOKEN]
        self.to_pixels, self.normalisation, self.pixel_shape = cheapest_way(self.image_processor)
        self.least_side = least_side(self.image_processor, self.pixel_shape)
        self.tiling = self.choose_tiling()
        self.any_resolution = self.tiling.any_resolution(self.num_visual_tokens) if self.tiling else None
        self.native_aspect = self.choose_aspect()
        self.layout: AnyResolution | NativeAspect | None = self.any_resolution or self.native_aspect

    def choose_aspect(self) -> NativeAspect | None:
        """The grid of patches from which images take as much as their aspect allows.

        Raises:
            ValueError: the encoder's patches are not known, or are not the visual tokens.
        """
        if self.image_fit != "aspect":
            return None
        aspect = NativeAspect(self.pixel_shape[1], self.patch) if self.patch else None
        if aspect is None or aspect.most != self.num_visual_tokens:
            raise ValueError(
                f"data.image_fit aspect with {self.num_visual_tokens} visual tokens and patches of {self.patch}: "
                f"each patch is a visual token, so that their size must be told and no connector may pool them"
            )
        return aspect

    def choose_tiling(self) -> Tiling | None:
        """The policy, at the size that the encoder reads.

        Raises:
            ValueError: settings that contradict each other, or an image processor that does more than resize.
        """
        if self.tiles == "none" and self.max_tiles is not None:
            raise ValueError(f"data.max_tiles {self.max_tiles} without data.tiles: set anyres or dynamic")
        if self.tiles != "none" and self.image_fit != "native":
            raise ValueError(f"data.image_fit {self.image_fit} with data.tiles {self.tiles}: tiles fit by themselves")
        if self.tiles == "anyres" and self.max_tiles == 1:
            raise ValueError("data.max_tiles 1 with data.tiles anyres, whose smallest grid has 2: raise it")
        if self.normalisation is None and (self.tiles != "none" or self.image_fit in ("crop", "resize", "aspect")):
            raise ValueError(
                f"{type(self.image_processor).__name__} does more than resize, crop and normalise: neither data.tiles "
                f"nor data.image_fit {self.image_fit} can take its place; choose another encoder"
            )
        resample = getattr(self.image_processor, "resample", None)
        self.resample = Image.Resampling.BICUBIC if resample is None else resample
        return None if self.tiles == "none" else Tiling(self.tiles, self.pixel_shape[1], self.max_tiles, self.resample)

    @property
    def tile_range(self) -> tuple[int, int]:
        """The fewest and the most tiles that an image becomes."""
        return self.tiling.range() if self.tiling else (1, 1)

    @property
    def token_range(self) -> tuple[int, int]:
        """The fewest and the most visual tokens that an image becomes."""
        if self.layout:
            return self.layout.range()
        fewest, most = self.tile_range
        return fewest * self.num_visual_tokens, most * self.num_visual_tokens

    def num_tiles(self, image: ImageSource) -> int:
        """What the encoder is handed for an image: 1, or as many tiles as its header says."""
        return self.taken(image).tiles

    def taken(self, image: ImageSource) -> Taken:
        """What an image takes, by its header."""
        if self.tiling is None and self.layout is None:
            return Taken(1, self.num_visual_tokens)
        try:
            width, height = image_size(image)
        except ValueError as error:
            raise Unreadable(str(error)) from error
        tiles = self.tiling.number(width, height) if self.tiling else 1
        return Taken(tiles, self.num_slots(tiles, [(height, width)]))

    def num_slots(self, tiles: int, sizes: list[tuple[int, int]]) -> int:
        """Of an image of so many tiles, and of that height and width if its tokens are laid out by them."""
        if self.layout is None:
            return tiles * self.num_visual_tokens
        return sum(self.layout.num_tokens(width, height) for height, width in sizes)

    def sizes(self, image: ImageSource) -> list[tuple[int, int]]:
        """Height and width of an image whose tokens are laid out by them; of others nothing."""
        return [image_size(image)[::-1]] if self.layout else []

    def seen_as(self, width: int, height: int) -> tuple[int, ...]:
        """What two images must share to stand in each other's slots: tiles, their grid, what is no border of it."""
        if self.any_resolution:
            return *self.any_resolution.grid(width, height), *self.any_resolution.kept(width, height)
        if self.native_aspect:
            return self.native_aspect.patches(width, height)
        return (self.tiling.number(width, height) if self.tiling else 1,)

    def framed(self, sample: Sample) -> Sample:
        """The sample with the chosen frames in the place of each video; what has none stays the same object."""
        return with_frames(sample, self.video_frames)

    def __call__(self, sample: Sample, max_length: int | None = None) -> Example:
        """The sample with its labels, cut to `max_length` tokens (never through an image).

        Raises:
            ValueError: placeholders and images differ, an image is unreadable, nothing is left to learn.
        """
        return self.example(sample, *self.tokens(sample, max_length))

    def example(self, sample: Sample, input_ids: list[int], labels: list[int], source: int = 0) -> Example:
        """The sample's tokens with the pixels of those images that stand in them."""
        sample = self.framed(sample)
        missing = input_ids.count(self.image_token_id)
        shown: list[Tensor] = []
        sizes: list[tuple[int, int]] = []
        for image in sample.images:
            if missing > 0:
                shown.append(self.image_pixels(image))
                sizes += (own := self.sizes(image))
                missing -= self.num_slots(len(shown[-1]), own)
        if missing:
            raise ValueError(f"{sample.where or sample.id}: an image has another size than when its tiles were counted")
        told = zip(self.instructions(sample), shown, strict=False)
        words = [tokens for tokens, tiles in told for _ in range(len(tiles))]
        pixels = self.stacked(shown)
        return Example(
            sample.id, input_ids, labels, pixels, sample.where, source, instructions=words, image_sizes=sizes
        )

    def tokens(self, sample: Sample, max_length: int | None = None) -> tuple[list[int], list[int]]:
        """What `encode` gives, or gave the last time if it is kept."""
        named = (sample.id, max_length)
        input_ids, labels = self.kept_tokens.get(named) or self.encode(sample, max_length)
        if self.keep:
            self.kept_tokens[named] = input_ids, labels
        return input_ids, labels

    def encode(self, sample: Sample, max_length: int | None = None) -> tuple[list[int], list[int]]:
        """`input_ids` and `labels` [T], expanded and cut; no image is opened."""
        encoded = self.encoded(sample, max_length)
        return encoded.input_ids, encoded.labels

    def encoded(self, sample: Sample, max_length: int | None = None) -> Encoded:
        """The same, with what was cut away: what stands behind `max_length`, and an image that would stand on both
        sides of it, with all that follows it.

        Raises:
            ValueError: placeholders and images differ; `TooLong`: nothing is left to learn.
        """
        sample = self.framed(sample)
        unsaid = None if self.image_markers == "none" else NUMBERED
        input_ids, labels = chat.encode(self.tokenizer, self.marked(sample), unsaid)
        places = self.check_placeholders(sample, input_ids)
        for place in places:  # an image in the assistant's own turn is shown, not said
            labels[place] = IGNORE_INDEX
        taken, end = self.fitting(sample.images, places, max_length)
        slots, tiles = [of.tokens for of in taken], sum(of.tiles for of in taken)
        input_ids, labels = self.expand(input_ids, places, slots), self.expand(labels, places, slots)
        if end is None or len(input_ids) <= end:
            return Encoded(input_ids, labels, len(taken), tiles)
        self.check_cut(sample, len(input_ids), labels[:end], max_length or end)
        return Encoded(input_ids[:end], labels[:end], len(taken), tiles, len(input_ids) - end)

    def marked(self, sample: Sample) -> list[Message]:
        """The messages with what stands around their images."""
        return sample.messages if self.image_markers == "none" else marked(sample.messages)

    def prompt(self, sample: Sample) -> Example:
        """The sample as a question: tokens up to where the assistant's next words begin, no labels."""
        sample = self.framed(sample)
        input_ids, places = self.asked(sample)
        taken, _ = self.fitting(sample.images, places, None)
        input_ids = self.expand(input_ids, places, [of.tokens for of in taken])
        return self.example(sample, input_ids, [IGNORE_INDEX] * len(input_ids))

    def asked(self, sample: Sample) -> tuple[list[int], list[int]]:
        """The tokens of a question before its images are expanded, and where these stand.

        Raises:
            ValueError: placeholders and images differ.
        """
        input_ids = chat.encode_prompt(self.tokenizer, self.marked(sample))
        return input_ids, self.check_placeholders(sample, input_ids)

    def instructions(self, sample: Sample) -> list[list[int]]:
        """For each image the tokens of the words of its own turn; none in the assistant's, whose words are answers."""
        if not self.instruct:
            return []
        found = []
        for message in sample.messages:
            words = "" if message.role == "assistant" or not message.num_images else message.text.strip()
            tokens = self.tokenizer(words, add_special_tokens=False)["input_ids"][-LONGEST_INSTRUCTION:]
            found += [tokens] * message.num_images
        return found

    def check_placeholders(self, sample: Sample, input_ids: list[int]) -> list[int]:
        """Where the placeholders stand: as many as images, as marked and as tokenised."""
        marks = sum(message.num_images for message in sample.messages)
        places = [place for place, token in enumerate(input_ids) if token == self.image_token_id]
        if not marks == len(places) == len(sample.images):
            raise ValueError(
                f"{sample.where or sample.id}: {len(places)} {IMAGE_TOKEN} placeholders in the prompt, {marks} marks "
                f"in the messages, {len(sample.images)} images must be equal (does the text itself say {IMAGE_TOKEN}?)"
            )
        return places

    def expand(self, values: list[int], places: list[int], slots: list[int]) -> list[int]:
        """Repeat each value that stands at a placeholder, and for images that `slots` does not tell of, which are cut
        away, V times."""
        expanded, start = [], 0
        for place, number in zip_longest(places, slots, fillvalue=self.num_visual_tokens):
            expanded += values[start:place]
            expanded += values[place : place + 1] * number
            start = place + 1
        return expanded + values[start:]

    def fitting(
        self, images: list[ImageSource], places: list[int], max_length: int | None
    ) -> tuple[list[Taken], int | None]:
        """What each image takes that fits, and where to cut: at `max_length`, or in front of the first image that
        does not fit. What stands behind the cut is not opened."""
        taken, added, end = list[Taken](), 0, float("inf") if max_length is None else max_length
        for place, image in zip(places, images, strict=True):
            start = place + added
            if start + self.num_visual_tokens > end:
                return taken, min(start, int(end))
            own = self.taken(image)
            if start + own.tokens > end:
                return taken, start
            taken.append(own)
            added += own.tokens - 1
        return taken, max_length

    def check_cut(self, sample: Sample, length: int, labels: list[int], max_length: int) -> None:
        """Something must be left to learn."""
        if any(label != IGNORE_INDEX for label in labels[1:]):
            return
        where = sample.where or sample.id
        if len(labels) < max_length:
            raise TooLong(
                f"{where}: {length} tokens do not fit a row of {max_length}, cutting them there would cut an image, "
                f"and in front of it is nothing to learn: raise data.seq_length or use a connector with fewer visual "
                f"tokens"
            )
        raise TooLong(f"{where}: {length} tokens cut to {max_length} leave nothing to learn: raise data.seq_length")

    def pixels(self, images: list[ImageSource]) -> Tensor:
        """[n, 3, H, W] uint8, or float32 where `normalisation` is None; n tiles of all images, may be 0."""
        return self.stacked([self.image_pixels(image) for image in images])

    def stacked(self, shown: list[Tensor]) -> Tensor:
        """[n_i, 3, H, W] of each image -> [n, 3, H, W]."""
        if not shown:
            return torch.empty(0, *self.pixel_shape, dtype=torch.uint8 if self.normalisation else torch.float32)
        return torch.cat(shown) if len(shown) > 1 else shown[0]

    def image_pixels(self, image: ImageSource) -> Tensor:
        """[tiles, 3, H, W], opened and processed, or kept from the last time."""
        name = str(image) if isinstance(image, str | Path) else ""
        if name in self.kept_pixels:
            return self.kept_pixels[name]
        pixels = self.made(image)
        if name and self.keep:
            self.kept_pixels[name] = pixels
        return pixels

    def made(self, image: ImageSource) -> Tensor:
        """[tiles, 3, H, W], opened and processed."""
        if self.tiling:  # by the size that the header tells, as they were counted, however large it is decoded
            grid = self.tiling.grid(*image_size(image))
            least = max(self.least_side, max(grid) * self.tiling.side)
            tiles = self.tiling.cut(open_image(image, least if self.jpeg_draft else None), grid)
            return torch.cat([as_bytes(tile) for tile in tiles])
        picture = open_image(image, self.least_side if self.jpeg_draft else None)
        if self.native_aspect:
            return in_patches(picture, self.native_aspect, image_size(image), self.resample)
        if self.image_fit in ("crop", "resize"):
            return as_bytes(squared(picture, self.pixel_shape, self.resample, crop=self.image_fit == "crop"))
        return self.to_pixels(self.fit(picture))

    def fit(self, image: Image.Image) -> Image.Image:
        """The image, padded to a square if `image_fit` says so."""
        if self.image_fit == "native" or image.width == image.height:
            return image
        image = ImageOps.contain(image, (LARGEST_SIDE, LARGEST_SIDE)) if max(image.size) > LARGEST_SIDE else image
        # rounded down, as LLaVA, its stock image processor and llama.cpp do
        mean = tuple(int(255 * value) for value in self.image_processor.image_mean)
        side = max(image.size)
        square = Image.new("RGB", (side, side), mean)
        square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
        return square

    def save(self, folder: Path) -> None:
        """Write tokenizer, image processor and the facts of this class; `load` reads them."""
        self.tokenizer.save_pretrained(folder)
        self.image_processor.save_pretrained(folder)
        facts = {name: getattr(self, name) for name in FACTS}
        (folder / "mllm_processor.json").write_text(json.dumps(facts, indent=2) + "\n")

    @classmethod
    def load(cls, folder: Path) -> Processor:
        """What `save` wrote."""
        facts = json.loads((folder / "mllm_processor.json").read_text())
        return cls.from_hub(str(folder), str(folder), **{name: facts[name] for name in FACTS if name in facts})

    @classmethod
    def from_hub(
        cls,
        llm: str,
        vision_encoder: str,
        num_visual_tokens: int,
        image_fit: ImageFit = "native",
        keep: bool = False,
        jpeg_draft: bool = False,
        instruct: bool = False,
        image_markers: ImageMarkers = "none",
        tiles: Tiles = "none",
        max_tiles: int | None = None,
        patch: int | None = None,
        video_frames: int = 8,
    ) -> Processor:
        """The LLM's tokenizer and the encoder's image processor, each by Hub id or folder."""
        from transformers import AutoTokenizer

        return cls(
            AutoTokenizer.from_pretrained(llm),
            load_image_processor(vision_encoder),
            num_visual_tokens,
            image_fit,
            keep,
            jpeg_draft,
            instruct,
            image_markers,
            tiles,
            max_tiles,
            patch if image_fit == "aspect" else None,
            video_frames,
        )
