"""A shape that moves from one quadrant to the one beside, above or below it, and the video of that.

Enters: a random stream. Leaves: a `Motion`; the frames of its video; two questions about it. The way it goes cannot be
told from any one frame, nor from all of them in another order: played backwards, a video has the other answer.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from PIL import Image, ImageDraw

from shapes.questions import Question
from shapes.scenes import (
    OVERSAMPLING,
    PIXELS,
    PLACES,
    RADII,
    STRAY,
    Scene,
    Thing,
    draw_ground,
    draw_scene,
    paint_outline,
    shade,
)
from shapes.scenes import TRAIN_PAIRS as PAIRS

FRAMES = 8
BACKWARDS = {"left": "right", "right": "left", "top": "bottom", "bottom": "top"}
"""To which side a shape goes, and to which when its video is played backwards."""


@dataclass(frozen=True)
class Motion:
    """`thing` stands where it begins."""

    thing: Thing
    end: str
    """The quadrant where it ends."""
    to: str
    """The side to which it goes."""


def draw_motion(rng: random.Random) -> Motion:
    """One shape, and one of the two ways that its quadrant leaves it."""
    scene: Scene = draw_scene(rng, PAIRS, most=1)
    thing = scene[0]
    row, column = thing.place.split()
    to = rng.choice([BACKWARDS[row], BACKWARDS[column]])
    return Motion(thing, f"{to} {column}" if to in ("top", "bottom") else f"{row} {to}", to)


def film(motion: Motion, rng: random.Random) -> list[Image.Image]:
    """`FRAMES` pictures, RGB, 64x64, on one ground; the shape goes at one speed."""
    ground, colour = draw_ground(rng), shade(motion.thing.colour, rng)
    radius = rng.uniform(*RADII[motion.thing.size])
    stray = min(STRAY, 15.0 - radius)
    begin, end = (
        [centre + rng.uniform(-stray, stray) for centre in PLACES[place]] for place in (motion.thing.place, motion.end)
    )
    frames = []
    for number in range(FRAMES):
        done = number / (FRAMES - 1)
        canvas = Image.new("RGB", (PIXELS * OVERSAMPLING, PIXELS * OVERSAMPLING), ground)
        x, y = (a + done * (b - a) for a, b in zip(begin, end, strict=True))
        paint_outline(ImageDraw.Draw(canvas), motion.thing.shape, (x, y), radius, colour)
        frames.append(canvas.reduce(OVERSAMPLING))
    return frames


def ask_motion(motion: Motion) -> list[Question]:
    """Which way, which needs the order of the frames; which colour, which any one of them tells."""
    return [
        Question("way", "way", "To the left, right, top or bottom?", motion.to, (motion.thing,)),
        Question("colour", "colour", "What colour is the shape?", motion.thing.colour, (motion.thing,)),
    ]
