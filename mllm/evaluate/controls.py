"""Two controls that tell a model that sees from one that guesses: the wrong picture, and no picture.

Enters: samples. Leaves: the same samples, in the same order, with other images. A model that looks loses its
accuracy on both; one that has learned which answers are frequent keeps it.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from mllm.types import Sample

if TYPE_CHECKING:
    import PIL.Image

    from mllm.types import ImageSource

MID_GREY = (128, 128, 128)

Picture = tuple[str, ...]
"""What tells the images of one sample from those of another: a name for each, in order."""


def shuffle_images(samples: list[Sample], seed: int) -> list[Sample]:
    """Give every sample the image(s) of another sample with a different picture, drawn by `seed`.

    Records that share a picture get the same other picture, so none can be handed its own. Samples trade only
    with those that have as many images; a sample without images stays as it is. Pictures are told apart by
    path, not by pixels.
    """
    other: dict[Picture, list[ImageSource]] = {}
    for count in sorted({len(sample.images) for sample in samples} - {0}):
        other |= _ring([sample for sample in samples if len(sample.images) == count], seed)
    return [replace(sample, images=list(other.get(_picture(sample), []))) for sample in samples]


def blank_images(samples: list[Sample]) -> list[Sample]:
    """Replace each image by uniform mid grey of the same size; only the header of the original is read."""
    return [replace(sample, images=[_grey(image) for image in sample.images]) for sample in samples]


def _ring(samples: Iterable[Sample], seed: int) -> dict[Picture, list[ImageSource]]:
    """Each distinct picture -> the images of the next in a ring of random order: none is its own next."""
    distinct = {_picture(sample): sample.images for sample in samples}
    pictures = list(distinct)
    if len(pictures) == 1:
        raise ValueError(
            f"cannot shuffle images: every sample shows {', '.join(pictures[0])}; "
            "expected at least two distinct images among the samples that have as many"
        )
    random.Random(seed).shuffle(pictures)
    following = pictures[1:] + pictures[:1]
    return {own: distinct[other] for own, other in zip(pictures, following, strict=True)}


def _picture(sample: Sample) -> Picture:
    return tuple(_name(image) for image in sample.images)


def _name(image: ImageSource) -> str:
    if isinstance(image, str | Path):
        return str(Path(image))
    if isinstance(image, Mapping):  # datasets' Image feature
        image = image.get("bytes") or str(image.get("path")).encode()
    pixels = image if isinstance(image, bytes) else image.tobytes()
    return f"an image in memory ({hashlib.sha256(pixels).hexdigest()[:16]})"


def _grey(image: ImageSource) -> PIL.Image.Image:
    import PIL.Image

    from mllm.data.images import image_size

    return PIL.Image.new("RGB", image_size(image), MID_GREY)
