"""A picture to the pixels that a vision encoder was trained on, up to the arithmetic that its device does better.

Enters: the encoder's own image processor, once; then Pillow images. Leaves: [1, 3, H, W] uint8, resized and cropped,
and the `Normalisation` that is left to do: a quarter of the bytes to copy between processes, to keep and to send.

Of three ways to the same pixels the cheapest is taken that gives, on pictures of noise, exactly what the image
processor itself gives: Pillow with its settings; the image processor without its last two steps; all of it, as
float32, where these steps are not the usual ones.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from mllm.native_aspect import NativeAspect
from mllm.types import Normalisation

Way = Callable[[Image.Image], Tensor]
Shape = tuple[int, int, int]
TOLERANCE = 1e-6
"""Of a normalised pixel in float32: what the order of operations may change."""


@dataclass(frozen=True)
class Resize:
    """What nearly all image processors do first, without their detour through four arrays."""

    size: tuple[int, int] | int
    """Height and width, or the length of the shortest edge."""
    resample: int
    crop: tuple[int, int] | None
    """Height and width of the centre that is kept."""

    def __call__(self, image: Image.Image) -> Tensor:
        """[1, 3, H, W] uint8."""
        width, height = self.target(*image.size)
        if self.crop and width > self.crop[1]:
            # Pillow too resizes rows first, then columns: those that are cut off need no second half
            image = image.resize((width, image.height), self.resample)
            left, width = (width - self.crop[1]) // 2, self.crop[1]
            image = image.crop((left, 0, left + width, image.height))
        image = image.resize((width, height), self.resample)
        if self.crop and height > self.crop[0]:
            top = (height - self.crop[0]) // 2
            image = image.crop((0, top, width, top + self.crop[0]))
        return as_bytes(image)

    def target(self, width: int, height: int) -> tuple[int, int]:
        """Width and height after resizing."""
        if isinstance(self.size, tuple):
            return self.size[1], self.size[0]
        longest = int(self.size * max(width, height) / min(width, height))
        return (self.size, longest) if width <= height else (longest, self.size)


def as_bytes(image: Image.Image) -> Tensor:
    """[1, 3, H, W] uint8 of an RGB image as it is."""
    pixels = np.empty((1, 3, image.height, image.width), np.uint8)
    for channel, band in enumerate(image.split()):
        pixels[0, channel] = np.asarray(band)
    return torch.from_numpy(pixels)


def squared(image: Image.Image, shape: Shape, resample: int, crop: bool) -> Image.Image:
    """The image at the encoder's size: the largest part of that aspect in its middle, or all of it, squeezed."""
    size = shape[2], shape[1]
    return ImageOps.fit(image, size, Image.Resampling(resample)) if crop else image.resize(size, resample)


def in_patches(image: Image.Image, aspect: NativeAspect, size: tuple[int, int], resample: int) -> Tensor:
    """[1, 3, side, side] uint8: the patches of the image of that width and height in reading order, then zeros."""
    (rows, columns), patch = aspect.patches(*size), aspect.patch
    pixels = as_bytes(image.resize((columns * patch, rows * patch), resample))
    own = pixels.unflatten(3, (columns, patch)).unflatten(2, (rows, patch))  # [1, 3, rows, p, columns, p]
    own = own.transpose(3, 4).flatten(2, 3)  # [1, 3, rows * columns, p, p]
    across = aspect.side // patch
    sheet = pixels.new_zeros(1, 3, across**2, patch, patch)
    sheet[:, :, : rows * columns] = own
    return sheet.unflatten(2, (across, across)).transpose(3, 4).flatten(4, 5).flatten(2, 3)


def cheapest_way(image_processor: Any) -> tuple[Way, Normalisation | None, Shape]:
    """The way to the pixels, what is left to do on the device (nothing if they are float32), and their shape.

    Raises:
        ValueError: the image processor makes something else of an image than one array of a fixed size.
    """
    pictures, wanted = probe(image_processor)
    shape = wanted[0].shape[1], wanted[0].shape[2], wanted[0].shape[3]
    normalisation = Normalisation.of(image_processor)
    split = partial(without_normalising, image_processor)
    try:
        found = [split(picture) for picture in pictures]
    except (TypeError, ValueError):  # it does not know the two words
        return partial(whole, image_processor), None, shape
    if any(pixels.dtype != torch.uint8 for pixels in found) or not same(map(normalisation, found), wanted):
        return partial(whole, image_processor), None, shape
    direct = settings(image_processor)
    if direct and all(torch.equal(direct(picture), pixels) for picture, pixels in zip(pictures, found, strict=True)):
        return direct, normalisation, shape
    return split, normalisation, shape


def probe(image_processor: Any) -> tuple[list[Image.Image], list[Tensor]]:
    """Noise, smaller and larger than what is wanted, wide and tall, of even and odd sides; what becomes of it."""
    name = type(image_processor).__name__
    pictures = [noise(30, 29)]
    try:
        made = [whole(image_processor, pictures[0])]
        height, width = made[0].shape[-2:]
        if made[0].shape == (1, 3, height, width):
            pictures += [noise(width // 2 + 1, height + 1), noise(2 * width + 51, height + 20)]
            made += [whole(image_processor, picture) for picture in pictures[1:]]
    except Exception as error:  # one that wants masks, prompts or pairs of images fails in its own way
        raise ValueError(f"{name} makes no pixels of a plain image ({error!r}): choose another encoder") from error
    shapes = {tuple(pixels.shape) for pixels in made}
    if shapes != {(1, 3, height, width)}:
        raise ValueError(
            f"{name} makes arrays of {', '.join(map(str, sorted(shapes)))} of images: expected one of [1, 3, H, W] for "
            f"all; write a fixed size into its preprocessor_config.json, or choose another encoder"
        )
    return pictures, made


def noise(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8))


def whole(image_processor: Any, image: Image.Image) -> Tensor:
    """[1, 3, H, W] float32, as the image processor makes them."""
    return torch.as_tensor(image_processor(images=[image], return_tensors="pt")["pixel_values"])


def without_normalising(image_processor: Any, image: Image.Image) -> Tensor:
    """[1, 3, H, W] uint8, if the image processor can leave its last two steps out."""
    made = image_processor(images=[image], return_tensors="pt", do_rescale=False, do_normalize=False)
    return torch.as_tensor(made["pixel_values"])


def same(some: Any, others: Sequence[Tensor]) -> bool:
    return all(torch.allclose(one, other, TOLERANCE, TOLERANCE) for one, other in zip(some, others, strict=True))


def settings(image_processor: Any) -> Resize | None:
    """The image processor's own, if they say no more than resize and crop."""
    size = sides(getattr(image_processor, "size", None))
    if set(size) == {"shortest_edge"}:
        to: tuple[int, int] | int = size["shortest_edge"]
    elif set(size) == {"height", "width"}:
        to = size["height"], size["width"]
    else:
        return None
    resample = getattr(image_processor, "resample", None)
    if not getattr(image_processor, "do_resize", False) or not isinstance(resample, int):
        return None
    crop = sides(image_processor.crop_size) if getattr(image_processor, "do_center_crop", False) else None
    if crop is None:
        return Resize(to, resample, None)
    if set(crop) != {"height", "width"} or max(crop.values()) > min(to if isinstance(to, tuple) else (to,)):
        return None  # a crop larger than the image pads it
    return Resize(to, resample, (crop["height"], crop["width"]))


def sides(size: Any) -> dict[str, int]:
    """The lengths that are set in a size of transformers."""
    return {name: length for name, length in dict(size or {}).items() if length}


def least_side(image_processor: Any, shape: Shape) -> int:
    """A picture both sides of which are at least this long is never enlarged."""
    return max(*shape[1:], *sides(getattr(image_processor, "size", None)).values())
