"""Which other sample a sample borrows its images from, when it is shown the wrong ones.

Enters: what is seen in each sample. Leaves: for each the number of another one, with as many images and never the same
picture. A model that looks at its images does worse on borrowed ones; one that guesses does not.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mllm.types import Frame, Video

if TYPE_CHECKING:
    from mllm.types import ImageSource

Picture = tuple[str, ...]
"""What tells the images of one sample from those of another: a name for each, in order."""


def picture(images: Sequence[ImageSource]) -> Picture:
    """Images are told apart by path, not by pixels; those that have no path by their bytes."""
    return tuple(map(image_name, images))


def image_name(image: ImageSource) -> str:
    if isinstance(image, str | Path):
        return str(Path(image))
    if isinstance(image, Mapping):  # datasets' Image feature
        image = image.get("bytes") or str(image.get("path")).encode()
    if isinstance(image, Frame):
        return f"{image_name(image.video)} (frame {image.number + 1} of {image.of})"
    if isinstance(image, Video):
        return " ".join(picture(image.source if isinstance(image.source, tuple) else (image.source,)))
    pixels = image if isinstance(image, bytes) else image.tobytes()
    return f"an image in memory ({hashlib.sha256(pixels).hexdigest()[:16]})"


def lenders(pictures: Sequence[Picture], seed: int, kinds: Sequence[tuple[Any, ...]] | None = None) -> list[int | None]:
    """For each sample the number of one with another picture, drawn by `seed`; None where it has no image, or where no
    other picture has as many; with `kinds`, which tell the tiles of each image, as many in each place.

    Samples that share a picture borrow the same other one, so that none can be handed its own.
    """
    lender: dict[Picture, int | None] = {(): None}
    kinds = [(1,) * len(picture) for picture in pictures] if kinds is None else kinds
    own_kind = {picture: kind for picture, kind in zip(pictures, kinds, strict=True) if picture}
    for kind in sorted(set(own_kind.values()), key=lambda kind: (len(kind), kind)):
        first = {
            picture: number for number, picture in reversed(list(enumerate(pictures))) if own_kind.get(picture) == kind
        }
        distinct = sorted(first, key=first.__getitem__)
        random.Random(seed).shuffle(distinct)
        following = distinct[1:] + distinct[:1]  # a ring: none is its own next
        lender |= {own: first[other] if other != own else None for own, other in zip(distinct, following, strict=True)}
    return [lender[picture] for picture in pictures]
