"""Images through the encoder in groups of one size, whatever the micro-batches hold.

Enters: pixels [N, 3, H, W], all at once or those of one micro-batch after the other. Leaves: their features
[N, P, Dv]. What is left of a micro-batch waits for the images of the next, so that only the last group of a step is
smaller: a device has enough to do in each, and of features no more than a group lies there beside those in use.

N images, P patches, Dv width of the encoder.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import ceil

import torch
from torch import Tensor

Encode = Callable[[Tensor], Tensor]
"""[n, 3, H, W] -> [n, P, Dv]."""


@dataclass
class Groups:
    """Of a run."""

    size: int
    """Images of a group; halved for good where memory has no room for one."""
    filled: bool = True
    """Do blank images stand in the places that are left, so that a compiled encoder meets one shape?"""


def in_groups(encoder: Encode, pixel_values: Tensor, size: int) -> Tensor:
    """[N, 3, H, W] -> [N, P, Dv]; with a gradient where a weight of the encoder asks for one."""
    return torch.cat([filled_up(encoder, group, size) for group in pixel_values.split(size)])


def filled_up(encoder: Encode, images: Tensor, size: int) -> Tensor:
    """[n, 3, H, W] -> [n, P, Dv], with blank images where there are fewer than `size`."""
    if len(images) >= size:
        return encoder(images)
    blanks = images.new_zeros(size - len(images), *images.shape[1:])
    return encoder(torch.cat([images, blanks]))[: len(images)]


class StepImages:
    """The images of a step's micro-batches, in order; each is encoded when the first of its group is asked for."""

    def __init__(
        self,
        encode: Encode,
        pixels: Iterable[Tensor],
        groups: Groups,
        send: Callable[[Tensor], Tensor],
        fewest: int = 1,
    ) -> None:
        """`pixels` are those of each micro-batch that has any, on the host; `send` brings them to the device. The
        encoder sees `fewest` images at least."""
        self.encode, self.groups, self.send, self.fewest = encode, groups, send, fewest
        self.waiting = deque(pixels)
        self.pixels: list[Tensor] = []
        """On the device, not encoded yet."""
        self.features: list[Tensor] = []
        """Encoded, not asked for yet."""

    @torch.no_grad()
    def take(self, images: int) -> Tensor:
        """The features of the next images [images, P, Dv]."""
        while sum(map(len, self.features)) < images:
            self.encode_group()
        together = torch.cat(self.features) if len(self.features) > 1 else self.features[0]
        self.features = [together[images:]]
        return together[:images].clone()  # what is kept for the backward pass is theirs alone

    def encode_group(self) -> None:
        """One, or half of it where memory has no room for more."""
        while sum(map(len, self.pixels)) < self.size and self.waiting:
            self.pixels.append(self.send(self.waiting.popleft()))
        together = torch.cat(self.pixels)
        while (found := self.tried(together[: self.size])) is None:
            pass
        self.features.append(found)
        self.pixels = [together[len(found) :].clone()]  # the others' memory is free

    @property
    def size(self) -> int:
        """Of the next group: without blank images all that are left of a step are alike, and none is a mere rest."""
        if self.groups.filled:
            return self.groups.size
        left = sum(map(len, (*self.waiting, *self.pixels)))
        assert left, "more images were asked for than the step has"
        return ceil(left / ceil(left / self.groups.size))

    def tried(self, images: Tensor) -> Tensor | None:
        """[n, 3, H, W] -> [n, P, Dv]; None where memory ran out, and groups are smaller from here on. No rank waits
        for this one meanwhile: none of the encoder's weights lies elsewhere."""
        seen = max(len(images), self.groups.size if self.groups.filled else self.fewest)
        try:
            return filled_up(self.encode, images, seen)
        except torch.OutOfMemoryError:
            if seen <= self.fewest:
                raise
        # behind the handler, which would keep what the encoder had begun
        self.groups.size = seen // 2
        if images.device.type == "cuda":
            torch.cuda.empty_cache()
        return None
