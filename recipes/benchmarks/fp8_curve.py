"""The loss curve of an align run with 8-bit products beside the same run without.

Enters: the folder of the tiny recipe, whose encoder and LLM are trained first where they are not there. Leaves: the
losses of each run and how far those with 8-bit products lie from the plain ones. In float32 on a CPU, so that nothing
but e4m3 differs; one in bfloat16 shows what that alone does. The gate is asked as on a GPU.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from statistics import mean
from typing import Any
from unittest import mock

import torch

from benchmarks.product import accelerate
from mllm.assembly import build, build_processor, plan_run, read_data
from mllm.config import RunConfig, load_config
from mllm.data.loader import batches
from mllm.models.multimodal import MultimodalLM
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
RUNS = ("plain", "bf16", "all", "gate")
"""In float32; in bfloat16, to compare with; with all products in 8-bit floats, unasked; with what the gate takes."""
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


def recipe(home: Path, out: Path, run: str = "plain", steps: int | None = None) -> RunConfig:
    """The tiny recipe's first stage, as one of `RUNS`."""
    config = load_config(demo.config("pretrain", home))
    config.data.num_workers = 0
    train = config.train
    train.output_dir, train.audit, train.probe = out, "off", run != "all"
    train.fp8, train.mixed_precision = run in ("all", "gate"), "bf16" if run == "bf16" else "no"
    train.log_every, train.hang_seconds, train.steps = QUIET, 0, steps or train.steps
    return config


def align(config: RunConfig) -> tuple[list[float], dict[str, Any]]:
    """The loss of each step, and what the gate wrote down."""
    torch.set_num_threads(1)
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
    config = recipe(home, out)
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


def compared(plain: Sequence[float], other: Sequence[float]) -> dict[str, float]:
    """How far the smoothed losses lie from the plain ones, of their size: at worst, from which step on, on average."""
    far = [theirs / own - 1 for own, theirs in zip(smoothed(plain), smoothed(other), strict=True)]
    worst = max(far, key=abs)
    return {"worst": abs(worst), "at": far.index(worst) + 1, "mean": mean(far)}


def smoothed(losses: Sequence[float]) -> list[float]:
    """Means of neighbours; of all where there are fewer."""
    window = min(WINDOW, len(losses))
    return [mean(losses[start : start + window]) for start in range(len(losses) - window + 1)]


def measure(home: Path, folder: Path, steps: int | None = None) -> dict[str, Any]:
    """All runs, two at a time, a core each."""
    configs = [recipe(home, folder / run, run, steps) for run in RUNS]
    with ProcessPoolExecutor(2, mp_context=get_context("fork")) as pool:
        runs = dict(zip(RUNS, pool.map(align, configs), strict=True))
    losses = {run: found for run, (found, _) in runs.items()}
    return {
        "steps": len(losses["plain"]),
        "window": WINDOW,
        "asked": ASKED,
        "losses": losses,
        "difference": {run: compared(losses["plain"], losses[run]) for run in RUNS[1:]},
        "taken": {run: record for run, (_, record) in runs.items() if record},
    }
