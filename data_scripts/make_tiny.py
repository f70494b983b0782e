"""Draw the "shapes" data set: small pictures, captions, questions, and the same scenes in words alone.

Enters: a seed. Leaves, in `--out`: 64x64 pictures of 1 to 3 shapes, `captions.jsonl`, `train.json`, `plain.json` and
`compositional.json` in LLaVA format, `texts.jsonl` (chats about scenes nobody drew), `scenes.json` (what each picture
holds) and `data.json`. Why: a whole training run, from pictures to a measured answer, offline and in minutes.

Four colour-shape pairs are held out strictly: no training picture, caption, question or text holds them, nor does the
`plain` split; every `compositional` picture does. A model that answers there has learned colours and shapes, not pairs.

    python data_scripts/make_tiny.py --out runs/tiny/data

With `--images-per-question 3` also `train_3.json` and `plain_3.json`: questions about one of three pictures, each of
one shape ("What colour is the shape in image 2?"). Beside them only `scenes.json` changes: it tells these pictures too.
"""

from __future__ import annotations

import json
import random
import sys
from dataclasses import astuple
from pathlib import Path
from typing import Any

from rich.progress import track

from mllm.data.curation.door import run
from shapes.one_of_several import MOST_TOGETHER, ask_about, opening
from shapes.questions import Asker, Question
from shapes.scenes import ALL_PAIRS, HELD_OUT, TRAIN_PAIRS, Scene, draw_scene, paint
from shapes.words import captions_of, phrases_of


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


def make_several(folder: Folder, split: str, pictures: int, records: int, together: int) -> None:
    """Questions about one of `together` pictures; `asked` in a record is the number, from 1, of the one to look at."""
    rng = folder.rng(f"{split} {together}")
    drawn: dict[str, Scene] = {}
    for index in track(range(pictures), f"{split} pictures of one shape"):
        scene = draw_scene(rng, TRAIN_PAIRS, most=1)
        drawn[folder.add(f"{split}_one", index, scene, rng)] = scene
    folder.write(
        f"{split}_{together}.json",
        [
            {
                "id": f"{split}-{together}-{number:05d}",
                "image": paths,
                "type": question.type,
                "asked": asked,
                "conversations": conversation(question, opening(together)),
            }
            for number in range(records)
            for paths, asked, question in [ask_about(drawn, together, rng)]
        ],
    )


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
    images_per_question: int = 1,
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
        images_per_question: More than 1 (at most 4): also questions about one of so many pictures.
    """
    if not 1 <= images_per_question <= MOST_TOGETHER:
        raise ValueError(f"--images-per-question {images_per_question}: expected 1 to {MOST_TOGETHER}")
    if images < 1 or held_out_images < 1:
        raise ValueError(f"--images {images} and --held-out-images {held_out_images}: expected at least 1 of each")
    folder = Folder(out, seed)
    make_train(folder, images, train_questions)
    for split in ("plain", "compositional"):
        make_held_out(folder, split, held_out_images, held_out_questions)
    make_texts(folder, texts)
    if images_per_question > 1:
        make_several(folder, "train", images // 3, 2 * images, images_per_question)
        make_several(folder, "plain", held_out_images, 2 * held_out_images, images_per_question)
    folder.write("scenes.json", {path: [astuple(thing) for thing in scene] for path, scene in folder.scenes.items()})
    counts = {"images": images, "held_out_images": held_out_images, "texts": texts}
    folder.write("data.json", counts | {"held_out_pairs": sorted(HELD_OUT), "seed": seed})


if __name__ == "__main__":
    sys.exit(run(main, None))
