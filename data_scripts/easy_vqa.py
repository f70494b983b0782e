"""easy-VQA's own layout to the layouts that recipes read, with some images held out.

    python data_scripts/easy_vqa.py --source PATH/easy-vqa --out runs/easy_vqa/data

Enters: the public data set (github.com/vzhou842/easy-VQA): `train/images/N.png` and `train/questions.json`, a list of
[question, answer, image number]. Leaves, in `--out`: `train.json` and `heldout.json` (LLaVA records, one a question,
its `type` beside it: of several questions the earlier answers would give the later ones away), `captions.jsonl`
(colour and shape as the training answers tell them) and `texts.jsonl` (the same questions about the caption instead
of the picture: food for a small LLM).

Images are held out whole: no question about a held-out picture is ever trained on.
"""

from __future__ import annotations

import json
import random
from collections import defaultdict
from pathlib import Path
from typing import Any

import tyro
from rich.progress import track

COLOURS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")
SHAPES = ("circle", "rectangle", "triangle")
Pair = tuple[str, str]


def main(source: Path, out: Path = Path("runs/easy_vqa/data"), held_out: int = 500, seed: int = 0) -> None:
    """Convert the public training set.

    Args:
        source: Folder that holds `train/`.
        out: The folder to write.
        held_out: Images, with all their questions, that are kept for evaluation.
        seed: Of the choice of those images.
    """
    asked = questions_by_image(source / "train" / "questions.json")
    numbers = sorted(asked)
    random.Random(seed).shuffle(numbers)
    out.mkdir(parents=True, exist_ok=True)
    link = out / "images"
    if not link.exists():
        link.symlink_to((source / "train" / "images").resolve())
    held, trained = sorted(numbers[:held_out]), sorted(numbers[held_out:])
    write_json(out / "heldout.json", records(held, asked, "heldout"))
    write_json(out / "train.json", records(trained, asked, "train"))
    described = [(n, described_by(asked[n])) for n in trained]
    write_lines(out / "captions.jsonl", [captions(n, *seen) for n, seen in described if seen])
    write_lines(out / "texts.jsonl", [in_words(pair, *seen) for n, seen in described if seen for pair in asked[n]])
    questions = sum(len(asked[n]) for n in held)
    print(f"{out}: {len(trained)} images to train on, {len(held)} held out with {questions} questions")


def questions_by_image(path: Path) -> dict[int, list[Pair]]:
    """(question, answer) pairs of each image."""
    if not path.is_file():
        raise SystemExit(f"error: no {path}: --source must be the folder of the public easy-VQA set")
    asked: dict[int, list[Pair]] = defaultdict(list)
    for question, answer, number in json.loads(path.read_text()):
        asked[number].append((question, answer))
    return asked


def described_by(pairs: list[Pair]) -> tuple[str, str] | None:
    """Colour and shape of the picture, if both are among the answers."""
    answers = {answer for _, answer in pairs}
    colour = next((c for c in COLOURS if c in answers), None)
    shape = next((s for s in SHAPES if s in answers), None)
    return (colour, shape) if colour and shape else None


def records(numbers: list[int], asked: dict[int, list[Pair]], split: str) -> list[dict[str, Any]]:
    """One LLaVA record for each question about each of these pictures."""
    return [record(n, k, pair, split) for n in track(numbers, split) for k, pair in enumerate(asked[n])]


def record(number: int, k: int, pair: Pair, split: str) -> dict[str, Any]:
    """One LLaVA record; its type is what is asked for."""
    question, answer = pair
    turns = [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": answer}]
    kind = "colour" if answer in COLOURS else "shape" if answer in SHAPES else "yes/no"
    return {"id": f"{split}-{number}-{k}", "image": f"images/{number}.png", "type": kind, "conversations": turns}


def captions(number: int, colour: str, shape: str) -> dict[str, Any]:
    """What the picture shows, in several ways; `phrases` are true of it and may be true of others."""
    said = [f"a {colour} {shape}", f"there is a {colour} {shape} in the image", f"the shape is a {colour} {shape}"]
    return {
        "id": f"train-{number}",
        "image": f"images/{number}.png",
        "captions": said,
        "phrases": [f"a {colour} {shape}", f"a {colour} shape", f"a {shape}"],
    }


def in_words(pair: Pair, colour: str, shape: str) -> dict[str, Any]:
    """A question with the caption in the picture's place."""
    question, answer = pair
    asked = {"role": "user", "content": f"a {colour} {shape}\n{question}"}
    return {"messages": [asked, {"role": "assistant", "content": answer}]}


def write_json(path: Path, records: list[dict[str, Any]]) -> None:
    path.write_text(json.dumps(records, indent=1) + "\n")


def write_lines(path: Path, records: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


if __name__ == "__main__":
    tyro.cli(main)
