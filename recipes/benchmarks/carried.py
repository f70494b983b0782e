"""The rate of the timed steps, carried to the whole mix of samples: a handful of batches is not the mix.

Enters: how many real tokens the whole mix has a position, the positions of the timed steps and their seconds. Leaves:
real tokens a second of the mix. It is a ratio estimator: fill of the whole mix x positions a second of the timed steps,
and so the luck of batches that pad little (or much) falls out. It takes a position to cost the same in every batch;
attention makes those of long ones dearer: where the timed batches are shorter than most, a padded way is told faster
than it is.

    python recipes/benchmarks/carried.py recipes/benchmarks/results/train-h200.json

adds the figure to rows that were measured without it, from what they kept: which batches were timed hangs on seeds
alone.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.append(str(Path(__file__).parents[1]))

import numpy as np

from benchmarks import naive
from benchmarks.drawn_training import Drawing, DrawnIndex, draw
from benchmarks.sizes import ENCODERS, LLMS

Numbers = Sequence[int]


def tokens_per_second(fill: float, positions: float, seconds: float) -> float:
    """Of the mix."""
    return fill * positions / seconds


def padded_positions(index: DrawnIndex, batches: Sequence[Numbers]) -> int:
    """Of batches that are padded to their longest sample."""
    return sum(int(index.length[numbers].max()) * len(numbers) for numbers in batches)


def padded_fill(index: DrawnIndex, batch: int) -> float:
    """Share of real tokens in all batches of an epoch."""
    epoch = list(islice(naive.order(len(index), batch), len(index) // batch))
    return float(sum(index.length[numbers].sum() for numbers in epoch) / padded_positions(index, epoch))


def drawing_of(kind: str, encoder: str, llm: str) -> Drawing:
    """The samples of a row."""
    shape = ENCODERS[encoder][1]
    patches = (shape["image_size"] // shape["patch_size"]) ** 2
    shrink = 16 if encoder == "tiny" else 1
    return Drawing(kind, patches, shape["image_size"], LLMS[llm]["vocab_size"], shrink=shrink)


def add(row: dict[str, Any]) -> dict[str, Any]:
    """A row as it was kept, with the rate of the mix.

    Raises:
        ValueError: the batches that are drawn now are not those that were timed.
    """
    if "tokens_per_second" not in row or "tokens_per_second_mix" in row:
        return row
    fill, positions = padded(row) if row["way"] == "naive" else packed(row)
    seconds = row["tokens_per_step"] * row["steps"] / row["tokens_per_second_mean"]
    own = {
        "fill": fill,
        "timed_fill": row["tokens_per_step"] * row["steps"] / positions,
        "tokens_per_second_mix": tokens_per_second(fill, positions, seconds),
    }
    return {**row, **own}


def padded(row: dict[str, Any]) -> tuple[float, int]:
    """Fill of the mix and the positions of the timed batches, which were in shuffled order."""
    index, _ = draw(drawing_of(row["kind"], row["encoder"], row["llm"]))
    first, number = row["warm_up"], row["steps"]
    timed = list(islice(naive.order(len(index), row["batch"]), first, first + number))
    tokens = int(index.length[np.concatenate(timed)].sum())
    if tokens != round(row["tokens_per_step"] * number):
        written = row["tokens_per_step"]
        raise ValueError(f"{row['name']}: {tokens} tokens in the timed batches, {written} a step were written down")
    return padded_fill(index, row["batch"]), padded_positions(index, timed)


def packed(row: dict[str, Any]) -> tuple[float, int]:
    """The same of rows that have one length."""
    return row["fill"], row["steps"] * row["accumulation"] * row["rows"] * row["seq_length"]


if __name__ == "__main__":
    for path in map(Path, sys.argv[1:]):
        found = json.loads(path.read_text())
        found["rows"] = {name: add(row) for name, row in found["rows"].items()}
        path.write_text(json.dumps(found, indent=2) + "\n")
