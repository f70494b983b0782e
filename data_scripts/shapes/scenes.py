"""What a picture holds, and the picture: one to three shapes, each in a quadrant of its own.

Enters: a random stream. Leaves: a `Scene`, and its 64x64 RGB image. Four colour-shape pairs are held out: who draws for
training draws from `TRAIN_PAIRS`.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from itertools import product

from PIL import Image, ImageDraw

PIXELS = 64
OVERSAMPLING = 3
"""Shapes are drawn this much larger and shrunk, so that their edges are smooth."""
COLOURS = {
    "red": (215, 35, 40),
    "green": (45, 160, 60),
    "blue": (45, 85, 225),
    "yellow": (240, 215, 40),
    "purple": (135, 50, 175),
    "orange": (245, 135, 25),
    "black": (25, 25, 30),
    "pink": (250, 150, 195),
}
RADII = {"small": (8.0, 9.0), "large": (12.5, 14.0)}
PLACES = {"top left": (16, 16), "top right": (48, 16), "bottom left": (16, 48), "bottom right": (48, 48)}
"""The four quadrants and their centres; a shape strays from the centre but never leaves its quadrant."""
STRAY = 3.0
"""Pixels that a shape may stand beside the centre of its quadrant."""
THIRD = 0.34
OUTLINES = {  # corners in units of the radius, y down; a circle needs none
    "circle": [],
    "square": [(-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)],
    "triangle": [(0.0, -1.0), (1.0, 0.85), (-1.0, 0.85)],
    "cross": [
        *[(-THIRD, -1.0), (THIRD, -1.0), (THIRD, -THIRD), (1.0, -THIRD), (1.0, THIRD), (THIRD, THIRD)],
        *[(THIRD, 1.0), (-THIRD, 1.0), (-THIRD, THIRD), (-1.0, THIRD), (-1.0, -THIRD), (-THIRD, -THIRD)],
    ],
}

Pair = tuple[str, str]
ALL_PAIRS = frozenset(product(COLOURS, OUTLINES))
HELD_OUT = frozenset({("red", "triangle"), ("blue", "circle"), ("yellow", "cross"), ("purple", "square")})
"""Each shape once, each colour at most once: all of them are plentiful in the other 28 pairs."""
TRAIN_PAIRS = ALL_PAIRS - HELD_OUT


@dataclass(frozen=True)
class Thing:
    """One shape of a scene. Its four attributes are the four words that tell it from another."""

    size: str
    colour: str
    shape: str
    place: str

    @property
    def pair(self) -> Pair:
        return self.colour, self.shape


ATTRIBUTES = ("size", "colour", "shape", "place")
Scene = list[Thing]


def draw_scene(
    rng: random.Random, pairs: frozenset[Pair], must_hold: frozenset[Pair] = frozenset(), most: int = 3
) -> Scene:
    """One to `most` things of `pairs`, each in a quadrant of its own; the first is one of `must_hold`, if any.

    No two share a colour or a shape, so that "the circle" and "the red shape" are always clear.
    """
    places = rng.sample(list(PLACES), rng.randint(1, most))
    chosen: list[Pair] = []
    for _ in places:
        free = sorted(pair for pair in (pairs if chosen or not must_hold else must_hold) if not clashes(pair, chosen))
        chosen.append(rng.choice(free))
    return [Thing(rng.choice(list(RADII)), *pair, place) for pair, place in zip(chosen, places, strict=True)]


def clashes(pair: Pair, chosen: list[Pair]) -> bool:
    return any(pair[0] == colour or pair[1] == shape for colour, shape in chosen)


def paint(scene: Scene, rng: random.Random) -> Image.Image:
    """The picture of a scene: RGB, 64x64, on a light ground that is never quite the same."""
    canvas = Image.new("RGB", (PIXELS * OVERSAMPLING, PIXELS * OVERSAMPLING), draw_ground(rng))
    pen = ImageDraw.Draw(canvas)
    for thing in scene:
        paint_thing(pen, thing, rng)
    return canvas.reduce(OVERSAMPLING)


def draw_ground(rng: random.Random) -> tuple[int, ...]:
    return tuple(rng.randint(225, 250) for _ in range(3))


def paint_thing(pen: ImageDraw.ImageDraw, thing: Thing, rng: random.Random) -> None:
    radius = rng.uniform(*RADII[thing.size])
    stray = min(STRAY, 15.0 - radius)
    x, y = (centre + rng.uniform(-stray, stray) for centre in PLACES[thing.place])
    paint_outline(pen, thing.shape, (x, y), radius, shade(thing.colour, rng))


def shade(colour: str, rng: random.Random) -> tuple[int, ...]:
    """Never quite the same."""
    return tuple(min(255, max(0, channel + rng.randint(-10, 10))) for channel in COLOURS[colour])


def paint_outline(
    pen: ImageDraw.ImageDraw, shape: str, at: tuple[float, float], radius: float, colour: tuple[int, ...]
) -> None:
    """`at` and `radius` in pixels of the finished picture."""
    (x, y), corners = at, OUTLINES[shape]
    if corners:
        pen.polygon([((x + radius * i) * OVERSAMPLING, (y + radius * j) * OVERSAMPLING) for i, j in corners], colour)
    else:
        box = (x - radius, y - radius, x + radius, y + radius)
        pen.ellipse([edge * OVERSAMPLING for edge in box], colour)
