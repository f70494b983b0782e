"""Questions about a scene, with answers that guessing does not find.

Enters: a scene. Leaves: `Question`s of seven types; an `Asker` keeps the answers to each kind in balance.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import permutations

from shapes.scenes import COLOURS, OUTLINES, RADII, Pair, Scene, Thing
from shapes.words import short_name, with_article


@dataclass(frozen=True)
class Question:
    """`kind` is the pattern whose answers are kept in balance; `about` the things one must look at."""

    type: str
    kind: str
    text: str
    answer: str
    about: tuple[Thing, ...]


OPEN_QUESTIONS = {
    "colour": "What colour is {}?",
    "shape": "What kind of shape is {}?",
    "size": "Is {} large or small?",
    "place": "Where is {}?",
}


def ask_attribute(attribute: str, scene: Scene, rng: random.Random) -> Iterator[Question]:
    for thing in scene:
        text = OPEN_QUESTIONS[attribute].format(short_name(thing, rng, hide=attribute))
        yield Question(attribute, attribute, text, getattr(thing, attribute), (thing,))


def ask_count(scene: Scene) -> Iterator[Question]:
    yield Question("count", "count all", "How many shapes are there?", str(len(scene)), tuple(scene))
    for size in RADII:
        found = tuple(thing for thing in scene if thing.size == size)
        yield Question("count", "count size", f"How many {size} shapes are there?", str(len(found)), found)


def ask_existence(scene: Scene, pairs: frozenset[Pair]) -> Iterator[Question]:
    """For a colour, for a shape, and for pairs that share one of the two with a thing of the scene: nothing easy."""
    for told, words in (("colour", COLOURS), ("shape", OUTLINES)):
        for word in words:
            found = tuple(thing for thing in scene if getattr(thing, told) == word)
            asked = f"{word} shape" if told == "colour" else word
            yield Question(
                "existence", told, f"Is there {with_article(asked)}?", yes_or_no(found), found or tuple(scene)
            )
    for colour, shape in sorted(pairs):
        near = tuple(thing for thing in scene if thing.colour == colour or thing.shape == shape)
        if near:
            there = any(thing.pair == (colour, shape) for thing in near)
            yield Question(
                "existence", "pair", f"Is there {with_article(f'{colour} {shape}')}?", yes_or_no(there), near
            )


def yes_or_no(holds: object) -> str:
    return "yes" if holds else "no"


def ask_comparison(scene: Scene, rng: random.Random) -> Iterator[Question]:
    for one, other in permutations(scene, 2):
        names = short_name(one, rng), short_name(other, rng)
        for kind, pattern, holds in comparisons(one, other):
            yield Question("comparison", kind, pattern.format(*names), yes_or_no(holds), (one, other))


def comparisons(one: Thing, other: Thing) -> Iterator[tuple[str, str, bool]]:
    """(kind, pattern, whether it holds) for all that is beyond doubt."""
    yield "larger", "Is {} larger than {}?", (one.size, other.size) == ("large", "small")
    (row, column), (other_row, other_column) = one.place.split(), other.place.split()
    if row != other_row:
        yield "above", "Is {} above {}?", row == "top"
    if column != other_column:
        yield "left of", "Is {} left of {}?", column == "left"


TYPES = (*OPEN_QUESTIONS, "count", "existence", "comparison")


class Asker:
    """Asks so that each answer to a kind of question is heard as often as the others: guessing must not pay."""

    def __init__(self, rng: random.Random, pairs: frozenset[Pair]):
        self.rng = rng
        self.pairs = pairs
        self.heard: Counter[tuple[str, str]] = Counter()

    def ask(self, scene: Scene, number: int, focus: Callable[[Question], bool] = bool) -> list[Question]:
        """`number` different questions about a scene, of as many types as it allows; `focus` may refuse some."""
        asked: dict[str, Question] = {}
        while len(asked) < number:
            for type_ in self.rng.sample(TYPES, len(TYPES)):
                question = self.pick([q for q in self.candidates(type_, scene) if focus(q) and q.text not in asked])
                if question and len(asked) < number:
                    self.heard[question.kind, question.answer] += 1
                    asked[question.text] = question
        return list(asked.values())

    def candidates(self, type_: str, scene: Scene) -> list[Question]:
        if type_ == "count":
            return list(ask_count(scene))
        if type_ == "existence":
            return list(ask_existence(scene, self.pairs))
        if type_ == "comparison":
            return list(ask_comparison(scene, self.rng))
        return list(ask_attribute(type_, scene, self.rng))

    def pick(self, questions: list[Question]) -> Question | None:
        """One of a random kind, with the answer heard least; None where that would tip yes against no."""
        if not questions:
            return None
        kind = self.rng.choice(sorted({question.kind for question in questions}))
        of_kind = [question for question in questions if question.kind == kind]
        least = min(of_kind, key=lambda question: (self.heard[kind, question.answer], self.rng.random()))
        opposite = {"yes": "no", "no": "yes"}.get(least.answer, least.answer)
        return None if self.heard[kind, least.answer] > self.heard[kind, opposite] + 1 else least
