"""How an image that keeps its aspect becomes a grid of patches, as many as an encoder takes at most: SigLIP2 NaFlex.

Enters: width and height of an image. Leaves: rows and columns of its patches, each of them one visual token. Both sides
of the house read it here: the data side resizes by it, the model side tells the encoder the shape of each grid.

The image travels in a square of as many patches as there may be: its own in reading order, then zeros. So all images
are one shape of pixels, and a batch of them is one tensor.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

SMALLEST, LARGEST, CLOSE = 1e-6, 100.0, 1e-5
"""Between which scales of the image NaFlex's own image processor searches, and how closely."""
WIDEST = 200
"""Times the other side: images beyond it are refused (`data/images.py`)."""


@dataclass(frozen=True)
class NativeAspect:
    """An encoder's patches."""

    side: int
    """Pixels along the square in which an image travels."""
    patch: int
    """Pixels along a side of a patch."""

    @property
    def most(self) -> int:
        """Patches of an image, at most."""
        return (self.side // self.patch) ** 2

    def patches(self, width: int, height: int) -> tuple[int, int]:
        """Rows and columns of the largest grid of that aspect, found by halving an interval of scales."""
        low, high = SMALLEST, LARGEST
        while high - low >= CLOSE:
            middle = (low + high) / 2
            rows, columns = self.grid(middle, width, height)
            low, high = (middle, high) if rows * columns <= self.most else (low, middle)
        return self.grid(low, width, height)

    def grid(self, scale: float, width: int, height: int) -> tuple[int, int]:
        """Rows and columns of the image at a scale; a patch that is begun counts."""
        return max(1, ceil(height * scale / self.patch)), max(1, ceil(width * scale / self.patch))

    def num_tiles(self, width: int, height: int) -> int:
        return 1

    def num_tokens(self, width: int, height: int) -> int:
        """Visual tokens of an image of that size."""
        rows, columns = self.patches(width, height)
        return rows * columns

    def range(self) -> tuple[int, int]:
        """The fewest and the most visual tokens of an image, of those one side of which is a multiple of the other."""
        counts = [self.num_tokens(ratio * self.side, self.side) for ratio in range(1, WIDEST + 1)]
        return min(counts), max(counts)
