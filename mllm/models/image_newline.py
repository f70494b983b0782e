"""The tokens of tiles laid out as the images that they were cut from, with a learned vector behind each row.

Enters: visual tokens of tiles [N, V, D], height and width of each image. Leaves: one sequence [T, D], image after
image: the whole one, then the grid row by row, its border left away, each row ended by the newline (LLaVA-NeXT). How
many that are for an image is `AnyResolution.num_tokens`, which the data side asks as well.

N tiles, V visual tokens of a tile, T of all images together, D width of the LLM.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mllm.any_resolution import AnyResolution


class ImageNewline(nn.Module):
    """One vector of the LLM's width; its use is the layout."""

    def __init__(self, layout: AnyResolution, width: int) -> None:
        super().__init__()
        self.layout = layout
        self.weight = nn.Parameter(torch.randn(width) * width**-0.5)

    def forward(self, tokens: Tensor, image_sizes: Sequence[tuple[int, int]] | None = None) -> Tensor:
        """[N, V, D] -> [T, D]; `image_sizes` are heights and widths. Where they are not told (a blank image, a trial)
        each tile is an image by itself: V tokens and one newline.

        Raises:
            ValueError: images of these sizes have another number of tiles.
        """
        newline = self.weight.to(tokens.dtype)
        if not image_sizes:
            return torch.cat([tokens, newline.expand(len(tokens), 1, -1)], dim=1).flatten(0, 1)
        tiles = [self.layout.num_tiles(width, height) for height, width in image_sizes]
        if sum(tiles) != len(tokens):
            raise ValueError(f"{len(tokens)} tiles, but images of {image_sizes} (height, width) have {tiles}")
        pieces: list[Tensor] = []
        for own, (height, width) in zip(tokens.split(tiles), image_sizes, strict=True):
            image = self.image(own[1:], width, height)  # [rows, columns, D]
            ended = torch.cat([image, newline.expand(len(image), 1, -1)], dim=1)  # [rows, columns + 1, D]
            pieces += [own[0], ended.flatten(0, 1)]
        return torch.cat(pieces)

    def image(self, tiles: Tensor, width: int, height: int) -> Tensor:
        """[tiles of the grid, V, D] -> [rows, columns, D], without border."""
        (columns, rows), across = self.layout.grid(width, height), self.layout.across
        grid = tiles.unflatten(0, (rows, columns)).unflatten(2, (across, across)).transpose(1, 2)
        grid = grid.flatten(2, 3).flatten(0, 1)  # [rows * across, columns * across, D]
        kept_rows, kept_columns = self.layout.kept(width, height)
        top, left = (grid.shape[0] - kept_rows) // 2, (grid.shape[1] - kept_columns) // 2
        return grid[top : top + kept_rows, left : left + kept_columns]
