"""One record to the members of a tar that stand for it, as our own formats and stock `webdataset` read them.

Enters: the samples of one record, and what may be done to images. Leaves: (part, bytes) of each member. A caption is
KEY.jpg, KEY.txt and KEY.json in img2dataset's manner; a chat is KEY.json (`messages`, `images`) with its pictures as
KEY.0.jpg, KEY.1.png. Image files are copied as they are, unless they are larger than asked for.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from PIL import Image

from mllm.data.containers.tar import IMAGES
from mllm.data.formats.captions import CaptionsSource
from mllm.data.formats.coco import CocoSource
from mllm.data.formats.source import Source
from mllm.data.images import open_image, opened, reason
from mllm.data.imaging.files import describe, stream
from mllm.types import IMAGE_TOKEN, Frame, ImageSource, Mark, Message, Sample, Video

Layout = Literal["captions", "messages"]
Member = tuple[str, bytes]
SUFFIXES = {
    **{"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp", "GIF": "gif", "BMP": "bmp", "DIB": "bmp"},
    **{"TIFF": "tiff", "PPM": "ppm", "AVIF": "avif", "JPEG2000": "jp2"},
}
"""What Pillow's formats are called in names of files."""
LOSSY = ("jpg", "webp", "avif", "jp2")
"""What becomes a JPEG when it is shrunk; all else becomes a PNG."""
QUALITY = 95
"""img2dataset's own when it encodes."""
TAKEN = {"id", "image", "images", "messages", "conversations", "conversation", "texts", "text_list", "image_info"}
"""Keys by which a format is recognised or which are written here: a column of such a name gets another one."""


@dataclass(frozen=True)
class Pictures:
    """What is done to images."""

    max_side: int | None = None
    """Shrink an image whose longer side has more pixels; None copies every file unchanged."""
    decode: bool = True
    """Decode every image to see whether it can be; if not, its header must do."""

    def file(self, image: ImageSource) -> tuple[str, bytes]:
        """Suffix and content of an image's file.

        Raises:
            ValueError: it cannot be read; names the image.
        """
        assert not isinstance(image, Image.Image), "sources name images"
        if isinstance(image, Video | Frame):
            raise ValueError(f"{describe(image)} is a video, which is not written to shards: train on it where it lies")
        try:
            found = stream(image)
            data = found.getvalue() if isinstance(found, io.BytesIO) else found.read_bytes()
            with opened(data) as picture:
                suffix, longest = SUFFIXES[str(picture.format)], max(picture.size)
        except MemoryError:
            raise
        except Exception as error:  # broken files make Pillow raise far more than OSError
            raise ValueError(f"cannot read image {describe(image)}: {reason(error)}") from error
        too_large = self.max_side is not None and longest > self.max_side
        if not (too_large or self.decode):
            return suffix, data
        try:
            pixels = open_image(data)
        except ValueError as error:
            raise ValueError(str(error).replace(describe(data), describe(image), 1)) from error
        return shrunk(pixels, suffix, self.max_side or longest) if too_large else (suffix, data)


def shrunk(image: Image.Image, suffix: str, max_side: int) -> tuple[str, bytes]:
    """Suffix and content of the file of an upright RGB image whose longer side is `max_side`."""
    scale = max_side / max(image.size)
    size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    small = image.resize(size, Image.Resampling.LANCZOS, reducing_gap=3.0)
    file = io.BytesIO()
    if suffix in LOSSY:
        small.save(file, "JPEG", quality=QUALITY)
        return "jpg", file.getvalue()
    small.save(file, "PNG")
    return "png", file.getvalue()


def layout_of(source: Source) -> Layout:
    """Captions under a bare image are written as captions, all else as chats."""
    return "captions" if isinstance(source, CaptionsSource | CocoSource) and not source.prompt else "messages"


def members_of(samples: list[Sample], layout: Layout, pictures: Pictures) -> list[Member]:
    """The members of one record, whose samples are captions of one image, or one chat.

    Raises:
        ValueError: an image cannot be read, or the words cannot be told from an image's place.
    """
    if layout == "captions":
        return caption_members(samples, *pictures.file(samples[0].images[0]))
    [sample] = samples
    return chat_members(sample, [pictures.file(image) for image in sample.images])


def caption_members(samples: list[Sample], suffix: str, data: bytes) -> list[Member]:
    """An image with its captions, or with the kinds of its caption as columns."""
    words = [sample.messages[-1].text for sample in samples]
    kinds = {sample.variant: text for sample, text in zip(samples, words, strict=True) if sample.variant}
    own: dict[str, Any] = {"id": base_id(samples), "caption": words[0], **kinds}
    if len(words) > 1 and not kinds:
        own["captions"] = words
    if suffix not in IMAGES:  # a suffix that readers do not know for an image's
        own["image"] = suffix
    first = kinds.get("txt", words[0])
    described = {**others(samples[0].meta, {**own, "txt": first, suffix: None}, {"captions"}), **own}
    return [(suffix, data), ("txt", first.encode()), ("json", to_json(described))]


def chat_members(sample: Sample, files: list[tuple[str, bytes]]) -> list[Member]:
    """A chat with its images, which may be none."""
    names = [f"{place}.{suffix}" for place, (suffix, _) in enumerate(files)]
    own = {"id": sample.id, "messages": [turn(message) for message in sample.messages]}
    if names:
        own["images"] = names
    described = {**others(sample.meta, {**own, **dict.fromkeys(names)}), **own}
    return [("json", to_json(described)), *((name, data) for name, (_, data) in zip(names, files, strict=True))]


def turn(message: Message) -> dict[str, Any]:
    """A message in OpenAI's manner: text alone as it is, images and words as parts."""
    if any(IMAGE_TOKEN in part for part in message.content if isinstance(part, str)):
        raise ValueError(f"the words themselves hold {IMAGE_TOKEN}, which a chat takes for an image's place: mask it")
    if Mark.IMAGE not in message.content:
        return {"role": message.role, "content": message.text}
    parts = [{"type": "image"} if part is Mark.IMAGE else {"type": "text", "text": part} for part in message.content]
    return {"role": message.role, "content": parts}


def base_id(samples: list[Sample]) -> str:
    """The record's id, from which `captions` makes those of its samples: what stands before the last #.

    A record of one caption whose mark is not 0 (COCO's number of the caption) keeps all of its id.
    """
    bases = {sample.id.rpartition("#")[0] for sample in samples}
    assert len(bases) == 1, f"{bases} are of one record"
    single = len(samples) == 1 and not samples[0].variant and not samples[0].id.endswith("#0")
    return samples[0].id if single else bases.pop()


def others(meta: Mapping[str, Any], own: dict[str, Any], taken: set[str] | None = None) -> dict[str, Any]:
    """The record's other columns; one whose name is taken becomes NAME_of_source, unless it says the same."""
    names = TAKEN | own.keys() | (taken or set())
    kept = {}
    for key, value in meta.items():
        name = str(key)
        if name.lower() not in names:
            kept[name] = value
        elif own.get(name) != value:
            kept[f"{name}_of_source"] = value
    return kept


def to_json(described: dict[str, Any]) -> bytes:
    return json.dumps(described, default=spelled_out).encode()


def spelled_out(value: Any) -> str:
    """What JSON has no form for: dates and decimals as text; of bytes in other columns only that there were some."""
    return f"({len(value)} bytes)" if isinstance(value, bytes) else str(value)
