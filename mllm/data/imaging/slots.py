"""How many tiles and visual tokens an image becomes, from its header alone.

Enters: what one tile becomes, which the model side tells from config, and how images are cut or kept in their aspect.
Leaves: of an image, or of its width and height, the tiles that the encoder is handed and the slots of its text; of a
text with several, where it has to be cut so that no image is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

from mllm.any_resolution import AnyResolution
from mllm.data.images import image_size
from mllm.data.imaging.tiling import Tiles, Tiling
from mllm.native_aspect import NativeAspect
from mllm.types import ImageSource

ImageFit = Literal["native", "pad", "crop", "resize", "aspect"]
Layout = AnyResolution | NativeAspect
"""What says where the tokens of an image stand, by its width and height."""


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
class Slots:
    """The two policies of an image's size, either or none."""

    num_visual_tokens: int
    """V: slots of an image, or of each tile of it."""
    tiling: Tiling | None
    layout: Layout | None

    @property
    def any_resolution(self) -> AnyResolution | None:
        return self.layout if isinstance(self.layout, AnyResolution) else None

    @property
    def native_aspect(self) -> NativeAspect | None:
        return self.layout if isinstance(self.layout, NativeAspect) else None

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

    def taken(self, image: ImageSource) -> Taken:
        """What an image takes, by its header."""
        if self.tiling is None and self.layout is None:
            return Taken(1, self.num_visual_tokens)
        try:
            width, height = image_size(image)
        except ValueError as error:
            raise Unreadable(str(error)) from error
        tiles = self.tiling.number(width, height) if self.tiling else 1
        return Taken(tiles, self.number(tiles, [(height, width)]))

    def number(self, tiles: int, sizes: list[tuple[int, int]]) -> int:
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


def choose_tiling(tiles: Tiles, max_tiles: int | None, image_fit: ImageFit, side: int, resample: int) -> Tiling | None:
    """The policy, at the size that the encoder reads.

    Raises:
        ValueError: settings that contradict each other.
    """
    if tiles == "none" and max_tiles is not None:
        raise ValueError(f"data.max_tiles {max_tiles} without data.tiles: set anyres or dynamic")
    if tiles != "none" and image_fit != "native":
        raise ValueError(f"data.image_fit {image_fit} with data.tiles {tiles}: tiles fit by themselves")
    if tiles == "anyres" and max_tiles == 1:
        raise ValueError("data.max_tiles 1 with data.tiles anyres, whose smallest grid has 2: raise it")
    return None if tiles == "none" else Tiling(tiles, side, max_tiles, resample)


def choose_aspect(image_fit: ImageFit, num_visual_tokens: int, side: int, patch: int | None) -> NativeAspect | None:
    """The grid of patches from which images take as much as their aspect allows.

    Raises:
        ValueError: the encoder's patches are not known, or are not the visual tokens.
    """
    if image_fit != "aspect":
        return None
    aspect = NativeAspect(side, patch) if patch else None
    if aspect is None or aspect.most != num_visual_tokens:
        raise ValueError(
            f"data.image_fit aspect with {num_visual_tokens} visual tokens and patches of {patch}: "
            f"each patch is a visual token, so that their size must be told and no connector may pool them"
        )
    return aspect
