"""Visual tokens of the images of a conversation, each computed once.

Enters: images by any of their names, and for a connector that reads them the words of each image's turn. Leaves: visual
tokens [S, D] of each image, S its slots. An image is known again by what it is: a file by its path, size and time
of change, a picture in memory by its pixels; a URL is fetched once.
"""

from __future__ import annotations

import os
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mllm.data.images import open_image
from mllm.data.processor import Processor
from mllm.models.multimodal import MultimodalLM
from mllm.models.splice import one_sequence
from mllm.types import Frame, ImageSource, Sample

OTHERS = 16
"""Images of earlier conversations that stay in memory, the last ones: of a few megabytes each."""


@dataclass(frozen=True)
class Picture:
    """What the LLM sees of an image."""

    number: int
    """Tells it from all others that were computed."""
    tokens: Tensor
    """[S, D]."""


class Pictures:
    """Remembers visual tokens by image (and by words, where the connector reads them)."""

    def __init__(self, model: MultimodalLM, processor: Processor) -> None:
        self.model, self.processor = model, processor
        self.known: dict[Hashable, Picture] = {}
        self.computed = 0

    @torch.no_grad()
    def __call__(self, sample: Sample, device: torch.device) -> list[Picture]:
        """The sample's images in order.

        Raises:
            ValueError: an image cannot be read.
        """
        words = self.processor.instructions(sample) or [[]] * len(sample.images)
        found = []
        for image, said in zip(sample.images, words, strict=True):
            key: Hashable = (name(image), *said)
            picture = self.known.pop(key, None) or self.compute(image, said, device)
            self.known[key] = picture  # now the youngest
            found.append(picture)
        for key in list(self.known)[: max(0, len(self.known) - len(found) - OTHERS)]:
            del self.known[key]
        return found

    def compute(self, image: ImageSource, said: list[int], device: torch.device) -> Picture:
        """Through encoder and connector."""
        pixels = self.processor.image_pixels(image).to(device)  # [n, 3, H, W]
        instruction = torch.tensor([said or [-1]] * len(pixels), device=device) if self.processor.instruct else None
        self.computed += 1
        tokens = self.model.visual_tokens(pixels, instruction, self.processor.slots.sizes(image))
        return Picture(self.computed, one_sequence(tokens))


def name(image: ImageSource) -> Hashable:
    """What tells this image from others."""
    if isinstance(image, str | Path):
        text = str(image)
        if text.startswith(("data:", "http://", "https://")):
            return digest(text.encode())
        return (text, *changed(text.removeprefix("file://").partition("::")[0]))
    if isinstance(image, bytes):
        return digest(image)
    if isinstance(image, Mapping):
        return name(image.get("bytes") or image.get("path") or "")
    if isinstance(image, Frame) and not isinstance(image.video.source, tuple):
        return name(image.video.source), image.number, image.of
    picture: Any = open_image(image)
    return (picture.size, digest(picture.tobytes()))


def changed(path: str) -> tuple[int, ...]:
    """Time and size of a file; nothing of one that is not there, which whoever opens it will say."""
    try:
        told = os.stat(path)
    except OSError:
        return ()
    return told.st_mtime_ns, told.st_size


def digest(data: bytes) -> bytes:
    return blake2b(data, digest_size=16).digest()
