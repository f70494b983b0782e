"""Draw the "shapes" data set: small pictures, captions, questions, and the same scenes in words alone.

Enters: a seed. Leaves, in `--out`: 64x64 pictures of 1 to 3 shapes, `captions.jsonl`, `train.json`, `plain.json` and
`compositional.json` in LLaVA format, `texts.jsonl` (chats about scenes nobody drew), `scenes.json` (what each picture
holds) and `data.json`. Why: a whole training run, from pictures to a measured answer, offline and in minutes.

Four colour-shape pairs are held out strictly: no training picture, caption, question or text holds them, nor does the
`plain` split; every `compositional` picture does. A model that answers there has learned colours and shapes, not pairs.

    python data_scripts/make_tiny.py --out runs/tiny/data
"""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import astuple, dataclass
from itertools import permutations, product
from pathlib import Path
from typing import Any

import tyro
from PIL import Image, ImageDraw
from rich.progress import track

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


# ---------------------------------------------------------------------------------------------- scenes


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


def draw_scene(rng: random.Random, pairs: frozenset[Pair], must_hold: frozenset[Pair] = frozenset()) -> Scene:
    """One to three things of `pairs`, each in a quadrant of its own; the first is one of `must_hold`, if any.

    No two share a colour or a shape, so that "the circle" and "the red shape" are always clear.
    """
    places = rng.sample(list(PLACES), rng.randint(1, 3))
    chosen: list[Pair] = []
    for _ in places:
        free = sorted(pair for pair in (pairs if chosen or not must_hold else must_hold) if not clashes(pair, chosen))
        chosen.append(rng.choice(free))
    return [Thing(rng.choice(list(RADII)), *pair, place) for pair, place in zip(chosen, places, strict=True)]


def clashes(pair: Pair, chosen: list[Pair]) -> bool:
    return any(pair[0] == colour or pair[1] == shape for colour, shape in chosen)


def paint(scene: Scene, rng: random.Random) -> Image.Image:
    """The picture of a scene: RGB, 64x64, on a light ground that is never quite the same."""
    ground = tuple(rng.randint(225, 250) for _ in range(3))
    canvas = Image.new("RGB", (PIXELS * OVERSAMPLING, PIXELS * OVERSAMPLING), ground)
    pen = ImageDraw.Draw(canvas)
    for thing in scene:
        paint_thing(pen, thing, rng)
    return canvas.reduce(OVERSAMPLING)


def paint_thing(pen: ImageDraw.ImageDraw, thing: Thing, rng: random.Random) -> None:
    radius = rng.uniform(*RADII[thing.size])
    stray = min(STRAY, 15.0 - radius)
    x, y = (centre + rng.uniform(-stray, stray) for centre in PLACES[thing.place])
    colour = tuple(min(255, max(0, channel + rng.randint(-10, 10))) for channel in COLOURS[thing.colour])
    corners = OUTLINES[thing.shape]
    if corners:
        pen.polygon([((x + radius * i) * OVERSAMPLING, (y + radius * j) * OVERSAMPLING) for i, j in corners], colour)
    else:
        box = (x - radius, y - radius, x + radius, y + radius)
        pen.ellipse([edge * OVERSAMPLING for edge in box], colour)


# ----------------------------------------------------------------------------------------------- words


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


# ------------------------------------------------------------------------------------------- questions


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


# --------------------------------------------------------------------------------------------- records


def conversation(question: Question, opening: str) -> list[dict[str, str]]:
    """One question and its answer as LLaVA turns.

    A record asks once: of several questions the earlier answers would give the later ones away unseen.
    """
    return [{"from": "human", "value": opening + question.text}, {"from": "gpt", "value": question.answer}]


def text_chat(scene: Scene, asker: Asker, rng: random.Random) -> dict[str, Any]:
    """A chat about a scene told in words, standing where a picture will stand later."""
    told, retold = rng.sample(captions_of(scene, rng), 2)
    if rng.random() < RETELL_SHARE:
        asked, answer = "Describe the picture.", retold
    else:
        question = asker.ask(scene, 1)[0]
        asked, answer = question.text, question.answer
    return {"messages": [{"role": "user", "content": f"{told}\n{asked}"}, {"role": "assistant", "content": answer}]}


RETELL_SHARE = 0.2
"""The share of texts that retell a scene in other words; the rest answer a question."""


# ----------------------------------------------------------------------------------------------- files


class Folder:
    """The data set being written: pictures as they come, everything else at the end."""

    def __init__(self, out: Path, seed: int):
        self.out = out
        self.seed = seed
        self.scenes: dict[str, Scene] = {}

    def rng(self, purpose: str) -> random.Random:
        """A stream of its own for each purpose: more training pictures do not change the held-out ones."""
        return random.Random(f"{self.seed}/{purpose}")

    def add(self, split: str, index: int, scene: Scene, rng: random.Random) -> str:
        """Draw one picture; return its path inside the folder."""
        path = f"images/{split}/{index:05d}.png"
        (self.out / path).parent.mkdir(parents=True, exist_ok=True)
        paint(scene, rng).save(self.out / path, compress_level=1)
        self.scenes[path] = scene
        return path

    def write(self, file: str, content: Any) -> None:
        """As lines if the name says `.jsonl`, as one value otherwise."""
        is_lines = file.endswith(".jsonl")
        text = "".join(json.dumps(row) + "\n" for row in content) if is_lines else json.dumps(content, indent=1)
        (self.out / file).write_text(text)


def make_train(folder: Folder, images: int, questions: int) -> None:
    rng = folder.rng("train")
    asker = Asker(rng, TRAIN_PAIRS)
    captions, records = [], []
    for index in track(range(images), "training pictures"):
        scene = draw_scene(rng, TRAIN_PAIRS)
        sample = {"id": f"train-{index:05d}", "image": folder.add("train", index, scene, rng)}
        captions.append(sample | {"captions": captions_of(scene, rng), "phrases": phrases_of(scene)})
        records += records_of(sample, asker.ask(scene, questions))
    folder.write("captions.jsonl", captions)
    folder.write("train.json", records)


def make_held_out(folder: Folder, split: str, images: int, questions: int) -> None:
    """In `compositional` nearly all questions are about the pair that is new."""
    is_new = split == "compositional"
    rng = folder.rng(split)
    asker = Asker(rng, ALL_PAIRS if is_new else TRAIN_PAIRS)
    records = []
    for index in track(range(images), f"{split} pictures"):
        scene = draw_scene(rng, TRAIN_PAIRS, HELD_OUT if is_new else frozenset())
        sample = {"id": f"{split}-{index:05d}", "image": folder.add(split, index, scene, rng)}
        records += records_of(sample, asker.ask(scene, questions, is_about_new if is_new else bool))
    folder.write(f"{split}.json", records)


def records_of(sample: dict[str, str], questions: list[Question]) -> list[dict[str, Any]]:
    """A LLaVA record for each question about one picture, with the question's type."""
    return [
        {
            "id": f"{sample['id']}-{number}",
            "image": sample["image"],
            "type": question.type,
            "conversations": conversation(question, "<image>\n"),
        }
        for number, question in enumerate(questions)
    ]


def is_about_new(question: Question) -> bool:
    return question.kind == "count all" or any(thing.pair in HELD_OUT for thing in question.about)


def make_texts(folder: Folder, texts: int) -> None:
    rng = folder.rng("texts")
    asker = Asker(rng, TRAIN_PAIRS)
    scenes = (draw_scene(rng, TRAIN_PAIRS) for _ in track(range(texts), "texts"))
    folder.write("texts.jsonl", (text_chat(scene, asker, rng) for scene in scenes))


def main(
    out: Path,
    images: int = 6000,
    held_out_images: int = 250,
    texts: int = 16000,
    train_questions: int = 4,
    held_out_questions: int = 5,
    seed: int = 0,
) -> None:
    """Draw the data set.

    Args:
        out: The folder to write.
        images: Training pictures.
        held_out_images: Pictures in each of `plain` and `compositional`.
        texts: Training chats for the small LLM, about scenes in words alone.
        train_questions: Questions, each a record, about a training picture.
        held_out_questions: Questions, each a record, about a held-out picture.
        seed: The same seed, the same files.
    """
    folder = Folder(out, seed)
    make_train(folder, images, train_questions)
    for split in ("plain", "compositional"):
        make_held_out(folder, split, held_out_images, held_out_questions)
    make_texts(folder, texts)
    folder.write("scenes.json", {path: [astuple(thing) for thing in scene] for path, scene in folder.scenes.items()})
    counts = {"images": images, "held_out_images": held_out_images, "texts": texts}
    folder.write("data.json", counts | {"held_out_pairs": sorted(HELD_OUT), "seed": seed})


if __name__ == "__main__":
    tyro.cli(main)
