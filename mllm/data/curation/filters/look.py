"""The look of a picture in 200 bytes: equal looks survive what copying does to pictures, and little else.

Enters: an RGB image. Leaves: 64 bits of a difference hash (N. Krawetz's dHash: is each of 9 x 8 grey pixels darker than
its right neighbour?) and 8 x 8 colours. The bits find a picture that was resized or compressed again; the colours tell
a red circle from a green one, which grey bits cannot: on 1,000 pictures of shapes (easy-VQA) bits alone call 46,000
pairs copies, bits with colours 3. A mirrored, turned or clearly cropped picture is another picture. What 8 x 8 cells
do not show is not seen: drawings that differ in one small pale shape look the same; fewer bits are stricter.
"""

from __future__ import annotations

import numpy as np
from PIL import Image

BYTES = 8 + 8 * 8 * 3
MARGIN = 2
"""Grey levels by which a neighbour must be brighter: noise on a flat ground is less, or it would toss the bits."""
AT_ONCE = 2**18
"""Pairs whose colours are compared at a time: 100 MB."""

Looks = np.ndarray
"""uint8 [N, 200]."""


def look(image: Image.Image) -> bytes:
    """The 200 bytes of an RGB image."""
    grey = np.asarray(image.convert("L").resize((9, 8), Image.Resampling.BILINEAR), np.int16)
    bits = np.packbits(grey[:, 1:] > grey[:, :-1] + MARGIN)
    colours = image.resize((8, 8), Image.Resampling.BOX if min(image.size) >= 8 else Image.Resampling.BILINEAR)
    return bits.tobytes() + colours.tobytes()


def stacked(looks: list[bytes]) -> Looks:
    """uint8 [N, 200]."""
    return np.frombuffer(b"".join(looks), np.uint8).reshape(-1, BYTES)


def bits_of(looks: Looks) -> np.ndarray:
    """uint64 [N]."""
    return np.ascontiguousarray(looks[:, :8]).view(">u8").ravel().astype(np.uint64)


def colours_apart(distance: int) -> int:
    """Levels, of 255, that a cell of a copy may differ by where `distance` bits may: 32 at 6 bits. JPEG of quality 30
    moves a cell of a photograph by up to 11 and of a drawing by 30; ten percent brighter is 23."""
    return 8 + 4 * distance


def same_colours(left: Looks, right: Looks, distance: int) -> np.ndarray:
    """bool [N]: whether no cell of one differs clearly from the same cell of the other."""
    same = np.empty(len(left), dtype=bool)
    for start in range(0, len(left), AT_ONCE):
        part = slice(start, start + AT_ONCE)
        some, others = left[part, 8:], right[part, 8:]
        apart = np.maximum(some, others) - np.minimum(some, others)  # uint8 has no negative numbers
        same[part] = apart.max(axis=1, initial=0) <= colours_apart(distance)
    return same
