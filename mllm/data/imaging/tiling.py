"""A picture cut into tiles, each of which the encoder reads as one image of its own size; and how many there will be.

Enters: width and height of a picture. Leaves: a grid of tiles and their number, from these two numbers alone, so that
lengths are known before a pixel is read. Enters: the picture. Leaves: as many squares.

- `anyres` (LLaVA-NeXT): the grid in which most of the picture's own pixels survive, and of those the one that wastes
  least; the picture keeps its aspect on black; the whole picture, squeezed to a square, comes first. The tokens of
  the border are left away and each row of tokens gets a learned end, see `mllm/any_resolution.py`.
- `dynamic` (InternVL 1.5): the grid of 1 to `max_tiles` whose aspect is nearest; the picture is squeezed into it; the
  whole picture comes last, unless it is the only tile. Each tile is V tokens, nothing stands between them.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, isqrt
from typing import Literal

from PIL import Image

from mllm.any_resolution import AnyResolution, TileGrid, roomiest

Tiles = Literal["none", "anyres", "dynamic"]
LLAVA_NEXT: list[TileGrid] = [(2, 1), (1, 2), (2, 2), (1, 3), (3, 1)]
"""Its `image_grid_pinpoints`, in their order."""
INTERNVL = 12
"""Its `max_dynamic_patch` in training."""


@dataclass(frozen=True)
class Tiling:
    """One policy."""

    policy: Literal["anyres", "dynamic"]
    side: int
    """Pixels along a side of a tile."""
    max_tiles: int | None = None
    """Of a grid, without the whole picture. Without it `anyres` has the five grids of LLaVA-NeXT, `dynamic` 12."""
    resample: int = Image.Resampling.BICUBIC

    def grids(self) -> list[TileGrid]:
        """Those that are chosen from; of equal ones the first wins."""
        if self.policy == "anyres" and self.max_tiles is None:
            return LLAVA_NEXT
        most, least = self.max_tiles or INTERNVL, 2 if self.policy == "anyres" else 1
        every = [(c, r) for c in range(1, most + 1) for r in range(1, most + 1) if least <= c * r <= most]
        return sorted(every, key=lambda grid: grid[0] * grid[1])

    def grid(self, width: int, height: int) -> TileGrid:
        """The grid of a picture of that size."""
        if self.policy == "anyres":
            return roomiest(self.grids(), self.side, width, height)
        return self.nearest(width, height)

    def number(self, width: int, height: int) -> int:
        """Tiles of a picture of that size, the whole picture among them."""
        columns, rows = self.grid(width, height)
        return columns * rows + self.has_overview(columns * rows)

    def range(self) -> tuple[int, int]:
        """The fewest and the most tiles of a picture."""
        counts = [c * r + self.has_overview(c * r) for c, r in self.grids()]
        return min(counts), max(counts)

    def has_overview(self, tiles: int) -> bool:
        return self.policy == "anyres" or tiles > 1

    def any_resolution(self, visual_tokens: int) -> AnyResolution | None:
        """How the tokens of `anyres` are laid out, each tile being so many; None for `dynamic`, whose are not.

        Raises:
            ValueError: the tokens of a tile fill no square.
        """
        if self.policy != "anyres":
            return None
        if isqrt(visual_tokens) ** 2 != visual_tokens:
            raise ValueError(
                f"data.tiles anyres with {visual_tokens} visual tokens a tile: laid out in rows they must fill "
                f"a square; choose another connector, or data.tiles dynamic"
            )
        return AnyResolution(self.side, isqrt(visual_tokens), tuple(self.grids()))

    def nearest(self, width: int, height: int) -> TileGrid:
        """InternVL's `find_closest_aspect_ratio`: of two as near, the larger, if the picture fills half of it."""
        best, least = (1, 1), float("inf")
        for columns, rows in self.grids():
            off = abs(width / height - columns / rows)
            roomy = width * height > 0.5 * self.side**2 * columns * rows
            if off < least or (off == least and roomy):
                best, least = (columns, rows), off
        return best

    def cut(self, image: Image.Image, grid: TileGrid) -> list[Image.Image]:
        """Squares of `side` pixels, row by row, with the whole picture before or behind them."""
        columns, rows = grid
        canvas = self.laid_out(image, columns * self.side, rows * self.side)
        corners = [(column * self.side, row * self.side) for row in range(rows) for column in range(columns)]
        tiles = [canvas.crop((left, top, left + self.side, top + self.side)) for left, top in corners]
        whole = [image.resize((self.side, self.side), self.resample)] if self.has_overview(len(tiles)) else []
        return whole + tiles if self.policy == "anyres" else tiles + whole

    def laid_out(self, image: Image.Image, across: int, down: int) -> Image.Image:
        """The picture as large as the grid: squeezed, or in its aspect with black around it."""
        if self.policy == "dynamic":
            return image.resize((across, down), self.resample)
        by_width, by_height = across / image.width, down / image.height
        if by_width < by_height:
            size = across, min(ceil(image.height * by_width), down)
        else:
            size = min(ceil(image.width * by_height), across), down
        canvas = Image.new("RGB", (across, down))
        canvas.paste(image.resize(size, self.resample), ((across - size[0]) // 2, (down - size[1]) // 2))
        return canvas
