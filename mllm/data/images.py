"""The one door through which pixels enter.

Enters: a path, a URL, a data URI, bytes or a Pillow image, from whoever made it. Leaves: an upright RGB image with
its pixels loaded, or one `ValueError` that names the image. Training, chat and evaluation all come through here, so
that a photograph never has two orientations.
"""

from __future__ import annotations

import base64
import io
import urllib.request
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from mllm.types import ImageSource

MAX_BYTES = 100 * 2**20
"""Nobody trains on larger files; whoever sends one wants to fill the memory."""
URL_SECONDS = 10
MAX_ASPECT = 200
"""Qwen2-VL's limit: an encoder that resizes the shortest edge makes gigabytes of a line one pixel thin."""


def open_image(source: ImageSource) -> Image.Image:
    """Decode, turn upright, flatten to RGB.

    Alpha is laid on white (dropping it would show what the author hid), 16-bit grey is scaled (Pillow alone
    saturates it), of an animation the first frame is taken. Truncated files and decompression bombs are errors.

    Raises:
        ValueError: names the image and says what is wrong with it.
    """
    try:
        if isinstance(source, Image.Image):
            return flatten(ImageOps.exif_transpose(sound(source)))
        with Image.open(stream(source)) as image:
            return flatten(ImageOps.exif_transpose(sound(image)))
    except MemoryError:
        raise
    except Exception as error:  # broken files make Pillow raise far more than OSError
        raise ValueError(f"cannot read image {describe(source)}: {reason(error)}") from error


def image_size(source: ImageSource) -> tuple[int, int]:
    """Width and height in pixels from the header alone (upright or not: the eye of an index, not of a model)."""
    try:
        if isinstance(source, Image.Image):
            return sound(source).size
        with Image.open(stream(source)) as image:
            return sound(image).size
    except Exception as error:
        raise ValueError(f"cannot read image {describe(source)}: {reason(error)}") from error


def sound(image: Image.Image) -> Image.Image:
    """The image itself, if its sides are such that a resize by the shortest one fits in memory."""
    if min(image.size) == 0 or max(image.size) > MAX_ASPECT * min(image.size):
        raise ValueError(f"{image.width} x {image.height} pixels: no side may be {MAX_ASPECT} times the other")
    return image


def stream(source: str | Path | bytes) -> io.BytesIO | Path:
    """A file to decode from: bytes in memory, or the path itself after a look at its size."""
    if isinstance(source, bytes):
        return io.BytesIO(limited(source))
    text = str(source)
    if text.startswith("data:"):
        return io.BytesIO(limited(base64.b64decode(text.partition(",")[2], validate=True)))
    if text.startswith(("http://", "https://")):
        with urllib.request.urlopen(text, timeout=URL_SECONDS) as answer:
            return io.BytesIO(limited(answer.read(MAX_BYTES + 1)))
    path = Path(text)
    if not path.is_file():
        raise FileNotFoundError("no such file")
    if path.stat().st_size > MAX_BYTES:
        raise ValueError(f"{path.stat().st_size} bytes, more than {MAX_BYTES}")
    return path


def limited(data: bytes) -> bytes:
    if len(data) > MAX_BYTES:
        raise ValueError(f"more than {MAX_BYTES} bytes")
    return data


def flatten(image: Image.Image) -> Image.Image:
    """Any Pillow mode to RGB, keeping what a viewer would show."""
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return to_eight_bits(image).convert("RGB")
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def to_eight_bits(image: Image.Image) -> Image.Image:
    """Grey with more than eight bits: 0..65535 for integers, 0..1 for floats that stay below one, else 0..255."""
    values = np.nan_to_num(np.asarray(image, dtype=np.float64))
    top = values.max(initial=0.0)
    if image.mode == "F":
        full = 1.0 if top <= 1.0 else 255.0
    else:  # `I` holds 32 bits, and files of 8 or of 16 are read into it; `I;16` says what it is
        full = 255.0 if image.mode == "I" and top <= 255 else 65535.0
    return Image.fromarray(np.clip(values * (255.0 / full), 0, 255).astype(np.uint8))


def describe(source: ImageSource) -> str:
    """A short name for messages: a data URI or bytes are not printed whole."""
    if isinstance(source, bytes):
        return f"({len(source)} bytes)"
    text = str(source)
    return text[:60] if text.startswith("data:") else text[:500]


def reason(error: Exception) -> str:
    return str(error)[:300] or type(error).__name__
