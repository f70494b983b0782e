"""Lengths like those of public data sets, by how their images become tokens: what packers are measured on.

Enters: the name of a mix. Leaves: a list of lengths in tokens, drawn with a seed. The benchmark and the tests of
packing share these, so that what the one claims the other holds.
"""

from __future__ import annotations

import numpy as np

MIXES = [
    ("native", 4096),
    ("tiles", 8192),
    ("instruct", 4096),
    ("instruct", 8192),
    ("captions 144", 4096),
    ("captions 256", 8192),
    ("captions 576", 4224),
]
"""Each mix with a row's length that suits it: where every image has the same tokens, 4096 may be a bad one."""


def mix(name: str, number: int = 8192, seed: int = 0) -> list[int]:
    """`number` lengths: images at native resolution, in tiles of 256 tokens, one in nearly every conversation, or one
    of constant tokens under each caption."""
    rng = np.random.default_rng(seed)
    sides = np.clip(rng.lognormal(3.1, 0.45, (2, number)), 4, 56).astype(int)
    tiles = rng.choice([1, 2, 3, 4, 5, 7, 9, 13], number, p=[0.1, 0.1, 0.2, 0.15, 0.15, 0.15, 0.1, 0.05])
    lengths = {
        "native": np.minimum(sides[0] * sides[1], 3200) + text(rng, number, 90, 0.8, 800),
        "tiles": 256 * tiles + text(rng, number, 150, 0.8, 2000),
        "instruct": 576 * (rng.random(number) < 0.94) + text(rng, number, 180, 0.8, 3000),
        "captions 144": 144 + text(rng, number, 27, 0.35, 120),
        "captions 256": 256 + text(rng, number, 27, 0.35, 120),
        "captions 576": 576 + text(rng, number, 26, 0.35, 120),
    }
    return lengths[name].tolist()


CONVERSATIONS = {"captions": (1.0, 27, 0.35, 120), "instruct": (0.94, 180, 0.8, 3000)}
"""Of a mix for training: the share of samples with an image, and the texts as `text` takes them."""


def conversations(kind: str, number: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """`number` samples of a mix for training: the tokens of their texts [number], and whether each has an image."""
    share, *texts = CONVERSATIONS[kind]
    rng = np.random.default_rng(seed)
    return text(rng, number, *texts), rng.random(number) < share


def text(rng: np.random.Generator, number: int, median: float, spread: float, longest: int) -> np.ndarray:
    """Tokens of texts: many short ones, a long tail."""
    return np.clip(np.rint(rng.lognormal(np.log(median), spread, number)), 6, longest).astype(int)
