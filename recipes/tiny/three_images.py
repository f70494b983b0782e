"""Ask the three-image model, and ask it again with the images in every other order.

Enters: a stage trained by `three_images.yaml`, and `plain_3.json` with `scenes.json` beside it. Leaves: a row an order,
printed and between two marks of `recipes/README.md`: how many answers are right for the order shown, and, of those
that had to change, how many did. Why: a model that finds the image by its number follows it; one that has learned
"something in view" is right for a third.

    python recipes/tiny/three_images.py --model runs/tiny/three_images
"""

from __future__ import annotations

import json
import os
from dataclasses import replace
from itertools import permutations
from pathlib import Path

import tyro

from connectors import README, put_between
from demo import ENVIRONMENT, HOME
from mllm.data.formats.llava import read_llava
from mllm.evaluate.exact import Answer, evaluate
from mllm.types import Message, Sample

MARK = "tiny-three-images"
ATTRIBUTES = {"colour": 1, "shape": 2}
"""Where `scenes.json` has it in a thing."""


def main(model: Path = HOME / "three_images", data: Path = HOME / "data") -> None:
    """Ask every held-out question once in each order of its images.

    Args:
        model: The trained stage.
        data: The folder by `make_tiny.py --images-per-question 3`.
    """
    os.environ.update(ENVIRONMENT)
    from mllm.generate import Assistant

    assistant = Assistant.load(model)
    samples = read_llava(data / "plain_3.json")
    things = {str(data / path): scene[0] for path, scene in json.loads((data / "scenes.json").read_text()).items()}
    orders = list(permutations(range(len(samples[0].images))))
    asked = [
        evaluate(assistant, [permuted(sample, order, things) for sample in samples])["answers"] for order in orders
    ]
    written = table(orders, asked)
    print(written)
    README.write_text(put_between(README.read_text(), written, MARK))


def permuted(sample: Sample, order: tuple[int, ...], things: dict[str, list[str]]) -> Sample:
    """The same question over the same images in another order, with the answer of the image that now has its number."""
    images = [sample.images[place] for place in order]
    answer = things[str(images[sample.meta["asked"] - 1])][ATTRIBUTES[sample.meta["type"]]]
    return replace(sample, images=images, messages=[*sample.messages[:-1], Message("assistant", [answer])])


def table(orders: list[tuple[int, ...]], asked: list[list[Answer]]) -> str:
    """Markdown, a row an order; the first is the order of the file."""
    rows = [
        "| images shown as | right | of the answers that had to change, changed to the right one |",
        "|---|---|---|",
    ]
    for order, answers in zip(orders, asked, strict=True):
        right = sum(answer["correct"] for answer in answers)
        moved = [now for now, before in zip(answers, asked[0], strict=True) if now["answer"] != before["answer"]]
        followed = f"{sum(answer['correct'] for answer in moved)} of {len(moved)}" if moved else ""
        shown = ", ".join(str(place + 1) for place in order)
        rows.append(f"| {shown} | {right / len(answers):.1%} of {len(answers)} | {followed} |".replace("%", " %"))
    return "\n".join(rows)


if __name__ == "__main__":
    tyro.cli(main)
