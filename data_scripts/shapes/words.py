"""A scene in words.

Enters: a scene. Leaves: names of its things, captions, and short phrases that each tell one attribute.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable

from shapes.scenes import ATTRIBUTES, Scene, Thing


def name(thing: Thing, attributes: Iterable[str] = ATTRIBUTES) -> str:
    """A thing in words, telling only `attributes`: "large red circle at the top left", "red shape"."""
    words = [getattr(thing, attribute) for attribute in ("size", "colour") if attribute in attributes]
    words.append(thing.shape if "shape" in attributes else "shape")
    return " ".join(words) + (f" at the {thing.place}" if "place" in attributes else "")


def short_name(thing: Thing, rng: random.Random, hide: str = "") -> str:
    """A name by shape or by colour, whichever does not tell `hide`: "the circle", "the red shape"."""
    return "the " + name(thing, [rng.choice([told for told in ("shape", "colour") if told != hide])])


def with_article(words: str) -> str:
    return ("an " if words[0] in "aeiou" else "a ") + words


def in_a_row(parts: list[str]) -> str:
    """ "a", "a and b", "a, b and c"."""
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)


def caption_plain(scene: Scene) -> str:
    return in_a_row([with_article(name(thing)) for thing in scene])


def caption_there_is(scene: Scene) -> str:
    return "there is " + caption_plain(scene)


def caption_picture(scene: Scene) -> str:
    return "a picture of " + caption_plain(scene)


CAPTIONS: list[Callable[[Scene], str]] = [caption_plain, caption_there_is, caption_picture]


def captions_of(scene: Scene, rng: random.Random) -> list[str]:
    """One caption in each phrasing, each naming the things in an order of its own."""
    return [phrase(rng.sample(scene, len(scene))) for phrase in CAPTIONS]


def phrases_of(scene: Scene) -> list[str]:
    """Short captions of one thing at its place, each telling one of its size, colour and shape.

    One at a time: a caption of a colour and a shape would teach which pairs exist.
    """
    return [with_article(name(thing, (told, "place"))) for thing in scene for told in ATTRIBUTES[:3]]
