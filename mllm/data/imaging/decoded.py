"""What Pillow has opened: is it one of the formats that training sets hold, does it fit in memory, how it becomes RGB.

Enters: a Pillow image, an image of a file or a frame of an animation. Leaves: the image itself where it is sound, and
RGB as a viewer would show it.
"""

from __future__ import annotations

import functools

import numpy as np
from PIL import Image

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "PPM", "AVIF", "JPEG2000")
"""What training sets hold. Pillow reads thirty more, some by starting another program, few of them ever attacked."""
MAX_PIXELS = 89_478_485
"""Pillow's own limit (a quarter of a GiB as RGB), at which it only warns; a few kilobytes may claim any size."""
MAX_ASPECT = 200
"""Qwen2-VL's limit: an encoder that resizes the shortest edge makes gigabytes of a line one pixel thin."""


@functools.cache
def known_formats() -> tuple[str, ...]:
    """Those of `FORMATS` that this build of Pillow has."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def sound(image: Image.Image) -> Image.Image:
    """The image itself, if it and a resize by its shortest edge fit in memory."""
    width, height = image.size
    if min(width, height) == 0 or max(width, height) > MAX_ASPECT * min(width, height):
        raise ValueError(f"{width} x {height} pixels: no side may be {MAX_ASPECT} times the other")
    if width * height > MAX_PIXELS:
        raise ValueError(f"{width} x {height} are more than {MAX_PIXELS} pixels")
    return image


def flatten(image: Image.Image) -> Image.Image:
    """Any Pillow mode to RGB, keeping what a viewer would show."""
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return to_eight_bits(image).convert("RGB")
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        flat = Image.new("RGB", image.size, "white")
        flat.paste(image, mask=image)
        return flat
    return image if image.mode == "RGB" else image.convert("RGB")


def to_eight_bits(image: Image.Image) -> Image.Image:
    """Grey with more than eight bits: scaled by the first customary white that no pixel exceeds."""
    values = np.nan_to_num(np.asarray(image).astype(np.float32), copy=False, posinf=0.0, neginf=0.0)
    whites = {"F": (1.0, 255.0, 65535.0), "I": (255.0, 65535.0)}  # `I` holds 32 bits, and files of 8 or 16 in them
    top = float(values.max())
    white = next((white for white in whites.get(image.mode, (65535.0,)) if top <= white), top)
    if (clear := image.info.get("transparency")) is not None:
        values[values == clear] = white
    values *= 255 / white
    return Image.fromarray(np.rint(values, out=values).clip(0, 255, out=values).astype(np.uint8))
