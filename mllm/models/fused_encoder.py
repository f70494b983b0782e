"""Several encoders as one: their features side by side, patch by patch (Prismatic: DINOv2 with SigLIP).

Enters: pixel_values [N, 3, H, W], uint8, as the first encoder's image processor cut them. Leaves: patch features
[N, P, Dv], Dv the sum of the encoders' widths.

A picture travels once. Each encoder sees the same part of it, resized on the device to its own size and normalised by
its own mean and deviation. All grids have as many patches (`vision_grid.common_grids`).

N images, P patches, Dv width of the features, H W pixels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from mllm.models.vision_encoder import VisionEncoder


class FusedEncoder(nn.Module):
    """Looks to the rest of the house like one `VisionEncoder`."""

    def __init__(self, encoders: list[VisionEncoder]) -> None:
        super().__init__()
        self.model: Any = nn.ModuleList(encoders)  # what peft may wrap, and then cannot be walked through
        self.encoders = tuple(encoders)
        self.grid, self.normalisation = encoders[0].grid, encoders[0].normalisation
        self.num_patches, self.feature_norm = self.grid.num_patches, encoders[0].feature_norm
        assert {encoder.num_patches for encoder in encoders} == {self.num_patches}
        self.width = sum(encoder.width for encoder in encoders)
        self.alike = len({encoder.normalisation for encoder in encoders}) == 1

    def forward(self, pixel_values: Tensor) -> Tensor:
        """[N, 3, H, W] -> [N, P, Dv].

        Raises:
            ValueError: the pixels are normalised already, for one encoder, and the others want them otherwise.
        """
        if pixel_values.dtype != torch.uint8 and not self.alike:
            raise ValueError(
                "pixels that are normalised already, for encoders that normalise differently: hand in uint8 pixels "
                "(an image processor that does other steps than resize, crop, rescale and normalise cannot lead)"
            )
        features = [encoder(resized(pixel_values, encoder.grid.side)) for encoder in self.encoders]
        return torch.cat(features, dim=-1)  # [N, P, Dv]

    def normalised(self, pixel_values: Tensor) -> Tensor:
        """[N, 3, H, W] float32 of uint8, as the first encoder wants it."""
        return self.encoders[0].normalised(pixel_values)

    def freeze_behind_tap(self) -> None:
        """As of one encoder."""
        for encoder in self.encoders:
            encoder.freeze_behind_tap()


def resized(pixels: Tensor, side: int) -> Tensor:
    """[N, 3, H, W] -> [N, 3, side, side], bicubic with antialiasing, of the same dtype; nothing where it fits."""
    if pixels.shape[-1] == side:
        return pixels
    made = interpolate(pixels.float(), size=(side, side), mode="bicubic", antialias=True)
    return made.round().clamp(0, 255).to(torch.uint8) if pixels.dtype == torch.uint8 else made.to(pixels.dtype)
