"""Runs whose micro-batches are as different as can be: text only, one image, several, a hole without any label."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from conftest import picture
from engines import start
from mllm.train.settings import TrainConfig
from mllm.train.trainable import LearningRates
from runs import LORA, run, settings

WHAT: dict[str, dict[str, Any]] = {
    "align": {"gradient_checkpointing": ["llm"]},
    "lora": {**LORA, "gradient_checkpointing": ["llm"]},
    "full": {"learning_rate": LearningRates(connector=1e-2, llm=1e-3, vision_encoder=1e-3)},
}
"""A frozen LLM; adapters; all three parts."""
LOADED: dict[str, Any] = {"packing": False, "max_bad_share": 1.0}
"""One sample a row, so that whole micro-batches are without an image, or without a label."""


def write_mixed(folder: Path, records: int) -> Path:
    """Of ten records about four have no image, three one, two several, one an image that cannot be read."""
    (folder / "images").mkdir(parents=True)
    draw = random.Random(5)
    written = []
    for row in range(records):
        images = draw.choice([0, 0, 0, 0, 1, 1, 1, 2, 3, -1])
        names = [f"images/{row}-{i}.png" for i in range(abs(images))]
        for i, name in enumerate(names):
            picture(10 * row + i).save(folder / name)
        if images == -1:  # its header is whole, so that it is found out when its turn comes
            (folder / names[0]).write_bytes((folder / names[0]).read_bytes()[:200])
        asked = "<image>\n" * len(names) + f"what is {row}? " + "so " * draw.randrange(12)
        answer = f"it is {row} " + "very " * draw.randrange(12)
        turns = [{"from": "human", "value": asked}, {"from": "gpt", "value": answer}]
        written.append({"id": f"r{row}", "image": names, "conversations": turns})
    (folder / "data.json").write_text(json.dumps(written))
    return folder / "data.json"


def mixed_config(folder: Path, what: str, steps: int) -> TrainConfig:
    """Steps of four rows, each a micro-batch: two ranks meet in two of them."""
    return settings(folder, steps=steps, rows_per_step=4, rows_per_micro_batch=1, hang_seconds=20, **WHAT[what])


def train_mixed(data: Path, folder: Path, steps: dict[str, int], accelerator: Accelerator | None = None) -> None:
    for what, number in steps.items():
        run(data, mixed_config(folder / what, what, number), accelerator=accelerator, **LOADED)


def on_rank(rank: int, engine: str, data: Path, folder: Path, steps: dict[str, int]) -> None:
    """One of two processes: every run of one engine."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    for what, number in steps.items():
        accelerator = start(engine, folder)
        train_mixed(data, folder / engine, {what: number}, accelerator)
        accelerator.wait_for_everyone()
    torch.distributed.destroy_process_group()
