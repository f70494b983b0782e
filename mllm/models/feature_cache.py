"""Patch features of a frozen encoder, kept from the first time: for sets that are seen many times.

Enters: pixels [N, 3, H, W]. Leaves: the features [N, P, Dv] that the encoder itself gives, each image encoded once;
those of a connector that pools them first are kept pooled, P being so many fewer (`MultimodalLM.kept`).
The key of an image is a digest of its pixels, so that nothing stale can be found under it; the encoder is frozen, so
that what is found is what would be computed.

N images, P patches, Dv width of the encoder.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from mllm.models.image_groups import Encode, filled_up

GROUP = 8
"""Images that go through the encoder together, always as many: the last bits of features hang on how many there are. A
run that was resumed meets its images in other company than the first time, and shall have the same losses."""


class FeatureCache:
    """Up to `gigabytes` of features in the computer's memory; what comes later is encoded anew each time."""

    def __init__(self, gigabytes: float) -> None:
        self.room = int(gigabytes * 2**30)
        self.kept: dict[bytes, Tensor] = {}

    def __call__(self, encode: Encode, pixel_values: Tensor) -> Tensor:
        """[N, 3, H, W] -> [N, P, Dv]; only images that are not kept go through the encoder."""
        keys = [digest(image) for image in pixel_values.cpu()]
        first = {key: number for number, key in enumerate(keys) if key not in self.kept}
        found = {key: self.kept[key] for key in keys if key in self.kept}
        for start in range(0, len(first), GROUP):
            group = dict(list(first.items())[start : start + GROUP])
            for key, features in zip(group, filled_up(encode, pixel_values[list(group.values())], GROUP), strict=True):
                found[key] = features
                self.keep(key, features)
        return torch.stack([found[key].to(pixel_values.device) for key in keys])  # [N, P, Dv]

    def keep(self, key: bytes, features: Tensor) -> None:
        size = features.numel() * features.element_size()
        if size <= self.room:
            self.room -= size
            self.kept[key] = features.cpu().clone()


def digest(image: Tensor) -> bytes:
    """128 bits of one image's pixels [3, H, W]: two different images never share them in practice."""
    return hashlib.blake2b(image.contiguous().view(torch.uint8).numpy().tobytes(), digest_size=16).digest()
