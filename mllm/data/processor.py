"""One sample to what the model sees. Training, chat and evaluation share this door: there is no second prompt
builder.

Enters: a `Sample`. Leaves: an `Example`, `pixel_values` [n, 3, H, W] uint8 (the device normalises them), `input_ids`
and `labels` [T] in which each image's placeholder is V slots wide, or V for each of its tiles, or as many as its size
asks for. What images become is said in `imaging/slots.py` and done in `imaging/transform.py`; here stand the words
around them. A processor is a value: `dataclasses.replace` makes another one.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mllm.data import chat
from mllm.data.imaging.frames import with_frames
from mllm.data.imaging.pixels import Shape
from mllm.data.imaging.slots import ImageFit, Layout, Slots
from mllm.data.imaging.tiling import Tiles
from mllm.data.imaging.transform import ImageTransform, image_transform
from mllm.data.talk.expansion import check_cut, expand, find_placeholders
from mllm.data.talk.markers import NUMBERED, ImageMarkers, marked
from mllm.image_processor import load_image_processor
from mllm.types import IGNORE_INDEX, IMAGE_TOKEN, Example, ImageSource, Message, Normalisation, Sample

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

FACTS = (
    *("num_visual_tokens", "image_fit", "jpeg_draft", "instruct", "image_markers", "tiles", "max_tiles", "patch"),
    "video_frames",
)
"""What a saved processor holds beside its tokenizer and image processor."""
LONGEST_INSTRUCTION = 128
"""Tokens of an instruction that a connector reads, the last ones: as many as InstructBLIP's released code."""


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


@dataclass(frozen=True)
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
    transform: ImageTransform = field(init=False, repr=False, compare=False)
    """What is done to images."""
    image_token_id: int = field(init=False, repr=False, compare=False)
    kept_pixels: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)
    kept_tokens: dict[tuple[str, int | None], tuple[list[int], list[int]]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        chat.ensure_template(self.tokenizer)
        if IMAGE_TOKEN not in self.tokenizer.get_vocab():
            self.tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE_TOKEN]})
        object.__setattr__(self, "image_token_id", self.tokenizer.get_vocab()[IMAGE_TOKEN])
        images = self.num_visual_tokens, self.image_fit, self.jpeg_draft, self.tiles, self.max_tiles, self.patch
        object.__setattr__(self, "transform", image_transform(self.image_processor, *images))

    @property
    def slots(self) -> Slots:
        """How many tiles and slots an image becomes."""
        return self.transform.slots

    @property
    def layout(self) -> Layout | None:
        """Where the tokens of an image stand if its size says it, which the model side is told."""
        return self.slots.layout

    @property
    def normalisation(self) -> Normalisation | None:
        """What is left to do on the device; nothing if the pixels are float32."""
        return self.transform.normalisation

    @property
    def pixel_shape(self) -> Shape:
        """[3, H, W] of a tile."""
        return self.transform.pixel_shape

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
                sizes += (own := self.slots.sizes(image))
                missing -= self.slots.number(len(shown[-1]), own)
        if missing:
            raise ValueError(f"{sample.where or sample.id}: an image has another size than when its tiles were counted")
        told = zip(self.instructions(sample), shown, strict=False)
        words = [tokens for tokens, tiles in told for _ in range(len(tiles))]
        pixels = self.transform.stacked(shown)
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
        places = find_placeholders(sample, input_ids, self.image_token_id)
        for place in places:  # an image in the assistant's own turn is shown, not said
            labels[place] = IGNORE_INDEX
        taken, end = self.slots.fitting(sample.images, places, max_length)
        slots, tiles = [of.tokens for of in taken], sum(of.tiles for of in taken)
        slots += [self.num_visual_tokens] * (len(places) - len(taken))  # of those that are cut away
        input_ids, labels = expand(input_ids, places, slots), expand(labels, places, slots)
        if end is None or len(input_ids) <= end:
            return Encoded(input_ids, labels, len(taken), tiles)
        check_cut(sample, len(input_ids), labels[:end], max_length or end)
        return Encoded(input_ids[:end], labels[:end], len(taken), tiles, len(input_ids) - end)

    def marked(self, sample: Sample) -> list[Message]:
        """The messages with what stands around their images."""
        return sample.messages if self.image_markers == "none" else marked(sample.messages)

    def prompt(self, sample: Sample) -> Example:
        """The sample as a question: tokens up to where the assistant's next words begin, no labels."""
        sample = self.framed(sample)
        input_ids, places = self.asked(sample)
        taken, _ = self.slots.fitting(sample.images, places, None)
        input_ids = expand(input_ids, places, [of.tokens for of in taken])
        return self.example(sample, input_ids, [IGNORE_INDEX] * len(input_ids))

    def asked(self, sample: Sample) -> tuple[list[int], list[int]]:
        """The tokens of a question before its images are expanded, and where these stand.

        Raises:
            ValueError: placeholders and images differ.
        """
        input_ids = chat.encode_prompt(self.tokenizer, self.marked(sample))
        return input_ids, find_placeholders(sample, input_ids, self.image_token_id)

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

    def pixels(self, images: list[ImageSource]) -> Tensor:
        """[n, 3, H, W] uint8, or float32 where `normalisation` is None; n tiles of all images, may be 0."""
        return self.transform.stacked([self.image_pixels(image) for image in images])

    def image_pixels(self, image: ImageSource) -> Tensor:
        """[tiles, 3, H, W], opened and processed, or kept from the last time."""
        name = str(image) if isinstance(image, str | Path) else ""
        if name in self.kept_pixels:
            return self.kept_pixels[name]
        pixels = self.transform(image)
        if name and self.keep:
            self.kept_pixels[name] = pixels
        return pixels

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
    def from_hub(cls, llm: str, vision_encoder: str, num_visual_tokens: int, **settings: Any) -> Processor:
        """The LLM's tokenizer and the encoder's image processor, each by Hub id or folder; `settings` by the names of
        the fields."""
        from transformers import AutoTokenizer

        if settings.get("image_fit") != "aspect":
            settings["patch"] = None
        tokenizer = AutoTokenizer.from_pretrained(llm)
        return cls(tokenizer, load_image_processor(vision_encoder), num_visual_tokens, **settings)
