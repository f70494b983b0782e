"""Images to what the encoder is handed: opened, fitted or cut into tiles, resized.

Enters: an image by any of its names, and once the encoder's own image processor with the settings of `data`. Leaves:
[tiles, 3, H, W] uint8, which the device normalises, or float32 where the image processor does more than resize, crop
and normalise. A value: nothing is set after it is made, so that every worker and every stage sees the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image, ImageOps

from mllm.data.images import image_size, open_image
from mllm.data.imaging.pixels import Shape, Way, as_bytes, cheapest_way, in_patches, least_side, squared
from mllm.data.imaging.slots import ImageFit, Slots, choose_aspect, choose_tiling
from mllm.data.imaging.tiling import Tiles
from mllm.types import ImageSource, Normalisation

if TYPE_CHECKING:
    from torch import Tensor

LARGEST_SIDE = 4096
"""An image is shrunk to this before it is padded: more than any encoder sees, and its square fits in memory."""


@dataclass(frozen=True)
class ImageTransform:
    """From an image to the pixels of its tiles."""

    image_processor: Any
    image_fit: ImageFit
    jpeg_draft: bool
    slots: Slots
    """How many tiles, and which."""
    to_pixels: Way
    normalisation: Normalisation | None
    """What is left to do on the device; nothing if the pixels are float32."""
    pixel_shape: Shape
    resample: int
    least_side: int
    """Pixels below which a picture would be enlarged: a JPEG is decoded at no less."""

    def __call__(self, image: ImageSource) -> Tensor:
        """[tiles, 3, H, W].

        Raises:
            ValueError: the image cannot be read.
        """
        if tiling := self.slots.tiling:  # by the header's size, as they were counted, however large it is decoded
            grid = tiling.grid(*image_size(image))
            least = max(self.least_side, max(grid) * tiling.side)
            tiles = tiling.cut(open_image(image, least if self.jpeg_draft else None), grid)
            return torch.cat([as_bytes(tile) for tile in tiles])
        picture = open_image(image, self.least_side if self.jpeg_draft else None)
        if aspect := self.slots.native_aspect:
            return in_patches(picture, aspect, image_size(image), self.resample)
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

    def stacked(self, shown: list[Tensor]) -> Tensor:
        """[n_i, 3, H, W] of each image -> [n, 3, H, W]; n may be 0."""
        if not shown:
            return torch.empty(0, *self.pixel_shape, dtype=torch.uint8 if self.normalisation else torch.float32)
        return torch.cat(shown) if len(shown) > 1 else shown[0]


def image_transform(
    image_processor: Any,
    num_visual_tokens: int,
    image_fit: ImageFit,
    jpeg_draft: bool,
    tiles: Tiles,
    max_tiles: int | None,
    patch: int | None,
) -> ImageTransform:
    """The transform of an image processor, whose cheapest way is looked for here.

    Raises:
        ValueError: settings that contradict each other, or an image processor that does more than resize.
    """
    to_pixels, normalisation, shape = cheapest_way(image_processor)
    resample = getattr(image_processor, "resample", None)
    resample = Image.Resampling.BICUBIC if resample is None else resample
    tiling = choose_tiling(tiles, max_tiles, image_fit, shape[1], resample)
    if normalisation is None and (tiling or image_fit in ("crop", "resize", "aspect")):
        raise ValueError(
            f"{type(image_processor).__name__} does more than resize, crop and normalise: neither data.tiles "
            f"nor data.image_fit {image_fit} can take its place; choose another encoder"
        )
    any_resolution = tiling.any_resolution(num_visual_tokens) if tiling else None
    layout = any_resolution or choose_aspect(image_fit, num_visual_tokens, shape[1], patch)
    slots = Slots(num_visual_tokens, tiling, layout)
    least = least_side(image_processor, shape)
    return ImageTransform(
        image_processor, image_fit, jpeg_draft, slots, to_pixels, normalisation, shape, resample, least
    )
