"""How an image of any size becomes tiles, and their visual tokens one sequence: LLaVA-NeXT's any resolution.

Enters: width and height of an image. Leaves: its grid of tiles, the part of the grid that is no border, and the number
of its visual tokens. Both sides of the house read it here: the data side plans with it, the model side lays the tokens
out by it (`models/image_newline.py`), and neither needs more than these two numbers.

The image keeps its aspect in the grid, on black. In front come the tokens of the whole image, squeezed to one tile;
behind them those of the grid, row by row over all of its tiles, without the rows or columns that show nothing but
border, and each row ends with one learned vector, the newline. As `LlavaNextProcessor` and
`LlavaNextForConditionalGeneration` of transformers compute it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

TileGrid = tuple[int, int]
"""Columns and rows."""


@dataclass(frozen=True)
class AnyResolution:
    """The grids to choose from, and how large a tile is in pixels and in visual tokens."""

    side: int
    """Pixels along a side of a tile."""
    across: int
    """Visual tokens along a side of a tile: the root of V."""
    grids: tuple[TileGrid, ...]
    """Of equally good ones the first wins."""

    def pinpoints(self) -> list[list[int]]:
        """The grids as transformers' configs have them: `image_grid_pinpoints`, height and width in pixels."""
        return [[rows * self.side, columns * self.side] for columns, rows in self.grids]

    def grid(self, width: int, height: int) -> TileGrid:
        """The grid of an image of that size."""
        return roomiest(self.grids, self.side, width, height)

    def num_tiles(self, width: int, height: int) -> int:
        """What the encoder is handed: the grid, and the whole image in front of it."""
        columns, rows = self.grid(width, height)
        return 1 + columns * rows

    def kept(self, width: int, height: int) -> tuple[int, int]:
        """Rows and columns of tokens that are left of the grid without its border."""
        across, down = (tiles * self.across for tiles in self.grid(width, height))
        if width / height > across / down:
            return without_border(down, height * (across / width)), across
        return down, without_border(across, width * (down / height))

    def num_tokens(self, width: int, height: int) -> int:
        """Visual tokens of an image of that size, newlines among them."""
        rows, columns = self.kept(width, height)
        return self.across**2 + rows * (columns + 1)

    def range(self) -> tuple[int, int]:
        """The fewest and the most visual tokens of an image. Of a line one pixel thin the whole image alone is left."""
        full = (rows * self.across * (columns * self.across + 1) for columns, rows in self.grids)
        return self.across**2, self.across**2 + max(full)


def roomiest(grids: Sequence[TileGrid], side: int, width: int, height: int) -> TileGrid:
    """The grid in which most of the image's own pixels survive; of those the one that wastes least."""

    def survives(grid: TileGrid) -> tuple[int, int]:
        across, down = grid[0] * side, grid[1] * side
        scale = min(across / width, down / height)
        pixels = min(int(width * scale) * int(height * scale), width * height)
        return pixels, pixels - across * down

    return max(grids, key=survives)


def without_border(whole: int, filled: float) -> int:
    """Rows (or columns) of `whole` when as many are cut on either side as hold border alone. Rounded to seven digits
    before the fraction is dropped, so that 3.9999999996 are 4."""
    return whole - (whole - int(round(filled, 7))) // 2 * 2
