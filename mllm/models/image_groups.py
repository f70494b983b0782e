"""Images through the encoder in groups of one size, whatever the micro-batches hold.

Enters: pixels [N, 3, H, W], all at once or those of one micro-batch after the other. Leaves: their features
[N, P, Dv]. What is left of a micro-batch waits for the images of the next, so that only the last group of a step has
blank images in it: a device has enough to do in each, and a compiled encoder meets one shape.

N images, P patches, Dv width of the encoder.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn


def in_groups(encoder: nn.Module, pixel_values: Tensor, size: int) -> Tensor:
    """[N, 3, H, W] -> [N, P, Dv]; with a gradient where a weight of the encoder asks for one."""
    return torch.cat([filled_up(encoder, group, size) for group in pixel_values.split(size)])


def filled_up(encoder: nn.Module, images: Tensor, size: int) -> Tensor:
    """[n, 3, H, W] -> [n, P, Dv] for up to `size` images, with blank ones in the places that are left."""
    blanks = images.new_zeros(size - len(images), *images.shape[1:])
    return encoder(torch.cat([images, blanks]))[: len(images)]  # type: ignore[no-any-return]


class StepImages:
    """The images of a step's micro-batches, in order; each is encoded when the first of its group is asked for."""

    def __init__(
        self, encoder: nn.Module, pixels: Iterable[Tensor], size: int, send: Callable[[Tensor], Tensor]
    ) -> None:
        """`pixels` are those of each micro-batch that has any, on the host; `send` brings them to the device."""
        self.encoder, self.size, self.send = encoder, size, send
        self.waiting = deque(pixels)
        self.pixels: list[Tensor] = []
        """On the device, not encoded yet."""
        self.features: list[Tensor] = []
        """Encoded, not asked for yet."""

    @torch.no_grad()
    def take(self, images: int) -> Tensor:
        """The features of the next images [images, P, Dv]."""
        while sum(map(len, self.features)) < images:
            self.encode()
        together = torch.cat(self.features)
        self.features = [together[images:]]
        return together[:images]

    def encode(self) -> None:
        """One group."""
        while sum(map(len, self.pixels)) < self.size and self.waiting:
            self.pixels.append(self.send(self.waiting.popleft()))
        assert self.pixels, "more images were asked for than the step has"
        together = torch.cat(self.pixels)
        self.features.append(filled_up(self.encoder, together[: self.size], self.size))
        self.pixels = [together[self.size :]]
