"""Two controls that tell a model that sees from one that guesses: the wrong picture, and no picture.

Enters: samples. Leaves: the same samples, in the same order, with other images. A model that looks loses its
accuracy on both; one that has learned which answers are frequent keeps it.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from mllm.data.other_pictures import lenders, picture
from mllm.types import Sample, Video

if TYPE_CHECKING:
    from mllm.types import ImageSource

MID_GREY = (128, 128, 128)


def shuffle_images(samples: list[Sample], seed: int) -> list[Sample]:
    """Give every sample the image(s) of another sample with a different picture, drawn by `seed`.

    Records that share a picture get the same other picture, so none can be handed its own. Samples trade only
    with those that have as many images; a sample without images stays as it is. Pictures are told apart by
    path, not by pixels.
    """
    lender = lenders(pictures := [picture(sample.images) for sample in samples], seed)
    for own, number in zip(pictures, lender, strict=True):
        if own and number is None:
            raise ValueError(
                f"cannot shuffle images: every sample shows {', '.join(own)}; "
                "expected at least two distinct images among the samples that have as many"
            )
    images = [[] if number is None else list(samples[number].images) for number in lender]
    return [replace(sample, images=borrowed) for sample, borrowed in zip(samples, images, strict=True)]


def check_images(samples: list[Sample]) -> None:
    """Every image that lies on this machine has a header that can be read: a missing one is told before the model is
    asked anything, with the record that names it.

    Raises:
        ValueError: names file, row and image.
    """
    from mllm.data.images import image_size
    from mllm.data.imaging.files import is_local

    sound: set[str] = set()
    for sample in samples:
        for image in sample.images:
            if isinstance(image, str | Path) and is_local(image) and str(image) not in sound:
                try:
                    image_size(image)
                except ValueError as error:
                    raise ValueError(f"{sample.where}: {error} (--image-dir names the folder of the images)") from error
                sound.add(str(image))


def blank_images(samples: list[Sample]) -> list[Sample]:
    """Replace each image by uniform mid grey of the same size; only the header of the original is read."""
    return [replace(sample, images=[_grey(image) for image in sample.images]) for sample in samples]


def _grey(image: ImageSource) -> ImageSource:
    import PIL.Image

    from mllm.data.images import image_size
    from mllm.data.imaging.videos import num_frames

    grey = PIL.Image.new("RGB", image_size(image), MID_GREY)
    return Video((grey,) * num_frames(image)[0]) if isinstance(image, Video) else grey
