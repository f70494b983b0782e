"""The loss curve of an align run with 8-bit products beside the same run without.

Enters: the folder of the tiny recipe, whose encoder and LLM are trained first where they are not there. Leaves: the
losses of each run and how far those with 8-bit products lie from the plain ones. All in float32 on a CPU, so that
nothing but e4m3 differs; the run asks its gate as on a GPU.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from statistics import mean
from typing import Any
from unittest import mock

import torch

from benchmarks.product import accelerate
from mllm.config import RunConfig, load_config
from mllm.data.loader import batches
from mllm.models.multimodal import MultimodalLM
from mllm.stage import build, build_processor, plan_run, read_data
from mllm.train.loop import fit
from mllm.train.route import deal
from mllm.train.trainable import choose_trainable
from mllm.train.tuning import fp8
from mllm.train.tuning.fp8_gate import FILE
from mllm.types import Batch
from tiny import demo

CPU = torch.device("cpu")
WINDOW = 10
"""Steps of which the mean loss is taken: one alone hangs on its samples as much as on what was learned."""
ASKED = 0.005
"""The most that the smoothed losses may differ, of their size."""
DEEP_LAYERS, DEEP_STEPS = 8, 200
"""Four times as many blocks as the recipe's LLM; its loss is 0.21 then, the recipe's 0.18."""
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
QUIET = 10_000
"""Steps between lines on the screen."""


def parts(home: Path) -> None:
    """Draw the data and train encoder and LLM, by the recipe's own commands, where that was not done before."""
    if not (home / "parts" / "parts.json").is_file():
        for step in demo.training_steps(home)[:2]:
            demo.run(step)


def deep(home: Path) -> Path:
    """An LLM with more blocks, trained on the same words where that was not done before; its folder."""
    out = home / "deep"
    if not (out / "llm" / "model.safetensors").is_file():
        (out / "llm").mkdir(parents=True, exist_ok=True)
        for name in TOKENIZER:
            shutil.copy(home / "parts" / "llm" / name, out / "llm" / name)
        sys.path.append(str(Path(demo.__file__).parent))  # where the recipe's own scripts import from
        from llm import train_llm

        train_llm(home / "data", out, DEEP_STEPS, DEEP_LAYERS)
    return out / "llm"


def recipe(home: Path, out: Path, eight: bool, probe: bool, steps: int | None = None) -> RunConfig:
    """The tiny recipe's first stage."""
    config = load_config(demo.config("pretrain", home))
    config.data.num_workers = 0
    train = config.train
    train.output_dir, train.fp8, train.probe, train.audit = out, eight, probe, "off"
    train.log_every, train.hang_seconds, train.steps = QUIET, 0, steps or train.steps
    return config


def align(config: RunConfig) -> tuple[list[float], dict[str, Any]]:
    """The loss of each step, and what the gate wrote down."""
    train = config.train
    train.output_dir.mkdir(parents=True)
    accelerator = accelerate(train, CPU)
    torch.manual_seed(train.seed)
    processor = build_processor(config)
    model = build(accelerator, config, processor)
    choose_trainable(model, train.learning_rate, None)
    index = read_data(accelerator, config, processor)
    plan = plan_run(config, index)
    # it refuses a CPU, which gains nothing, and float32
    with mock.patch.object(fp8, "check"), mock.patch("mllm.train.metrics.draw_loss"):
        fit(accelerator, model, processor, index, plan, config.data, train)
    accelerator.free_memory()
    lines = (train.output_dir / "metrics.jsonl").read_text().splitlines()
    record = train.output_dir / FILE
    return [json.loads(line)["loss"] for line in lines], json.loads(record.read_text()) if train.fp8 else {}


def beginning(home: Path, out: Path, llm: Path, rows: int) -> tuple[MultimodalLM, list[Batch]]:
    """The recipe's model before its first step, with that LLM, and its first rows, each a micro-batch."""
    config = recipe(home, out, eight=False, probe=False)
    config.parts().llm = str(llm)
    config.train.rows_per_micro_batch = 1
    accelerator = accelerate(config.train, CPU)
    torch.manual_seed(config.train.seed)
    processor = build_processor(config)
    model = build(accelerator, config, processor)
    choose_trainable(model, config.train.learning_rate, None)
    index = read_data(accelerator, config, processor)
    dataset = deal(accelerator, index, plan_run(config, index), processor, config.train)
    return model, list(islice(batches(dataset, 0, 1, 0), rows))


def compared(plain: Sequence[float], eight: Sequence[float]) -> float:
    """The largest difference of the smoothed losses, of their size."""
    return max(abs(one - other) / one for one, other in zip(smoothed(plain), smoothed(eight), strict=True))


def smoothed(losses: Sequence[float]) -> list[float]:
    """Means of neighbours; of all where there are fewer."""
    window = min(WINDOW, len(losses))
    return [mean(losses[start : start + window]) for start in range(len(losses) - window + 1)]


def measure(home: Path, folder: Path, steps: int | None = None) -> dict[str, Any]:
    """Three runs: plain, all in 8 bits unasked, and what the gate takes."""
    runs = {
        name: align(recipe(home, folder / name, name != "plain", name == "gate", steps))
        for name in ("plain", "all", "gate")
    }
    plain = runs["plain"][0]
    return {
        "steps": len(plain),
        "window": WINDOW,
        "asked": ASKED,
        "losses": {name: losses for name, (losses, _) in runs.items()},
        "difference": {name: compared(plain, losses) for name, (losses, _) in runs.items() if name != "plain"},
        "taken": {name: record for name, (_, record) in runs.items() if record},
    }
