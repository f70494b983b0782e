"""The whole road in one command: draw data, train the parts, align, instruct, evaluate, chat, report.

Enters: nothing but a CPU; no network. Leaves, in `--out`: the model in `instruct/`, `report.json` (accuracies as
fractions, seconds, machine), `report.html` and `report.png`. Why: what this prints was measured here and now, by the
same scripts that train a model of real size, each run as a person would run it.

    python recipes/tiny/demo.py --out runs/tiny
"""

from __future__ import annotations

import json
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tyro
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from mllm.data.formats.llava import read_llava
from mllm.evaluate.controls import blank_images, shuffle_images
from mllm.evaluate.exact import Result, evaluate, follow
from mllm.evaluate.report import write_report
from mllm.quiet import quiet_libraries
from mllm.types import Sample

TITLE = "mllm tiny: a vision encoder, a connector, an LLM"
LAUNCH = ["accelerate", "launch", "--num_processes", "1", "--cpu"]
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "DS_ACCELERATOR": "cpu",  # where DeepSpeed is installed it would warn that it found no other
    # glibc gives each freed tensor back to the kernel and gets it anew; keeping it saves a tenth of a step
    "MALLOC_MMAP_THRESHOLD_": str(2**30),
    "MALLOC_TRIM_THRESHOLD_": str(2**31),
}
HOME = Path("runs/tiny")
"""The folder that the YAML files of this recipe name."""
STAGES = ("align", "instruct")
SHUFFLE_SEED = 0

MEANING = {
    "plain": "held-out pictures",
    "compositional": "unseen colour-shape pairs",
    "shuffled": "plain, wrong picture",
    "blank": "plain, grey picture",
}

console = Console()


@dataclass(frozen=True)
class Step:
    """One command of the demo; `name` is its key in the report's `seconds`."""

    name: str
    what: str
    command: list[str]


@dataclass
class Clock:
    """The seconds of each step, in order."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def time(self, name: str, what: str) -> Iterator[None]:
        """Print the header of a step, run it, and keep how long it took."""
        console.rule(f"[bold]{name}[/]  {what}", align="left")
        start = time.perf_counter()
        yield
        self.seconds[name] = round(time.perf_counter() - start, 2)
        console.print(f"[dim]{name}: {self.seconds[name]:.1f} s[/]\n")


def main(out: Path = HOME) -> None:
    """Build, train and ask the tiny model.

    Args:
        out: The folder to write.
    """
    os.environ.update(ENVIRONMENT)
    start, clock = time.perf_counter(), Clock()
    for step in training_steps(out):
        with clock.time(step.name, step.what):
            run(step)
    with clock.time("evaluate", "two held-out sets and two controls"):
        results = evaluate_all(out / "instruct", out / "data")
    with clock.time("chat", "the same model, as a person meets it"):
        for step in chats(out / "instruct", results):
            run(step)
    clock.seconds["total"] = round(time.perf_counter() - start, 2)
    report(out, results, clock.seconds)


def training_steps(out: Path) -> list[Step]:
    """Four commands that could be typed by hand."""
    data, parts = str(out / "data"), str(out / "parts")
    return [
        Step("data", "draw pictures, captions, questions", ["python", "data_scripts/make_tiny.py", "--out", data]),
        Step(
            "parts",
            "train a CLIP and a small LLM, which a real job takes from the Hub",
            ["python", "recipes/tiny/parts.py", "--data", data, "--out", parts],
        ),
        Step("align", "stage 1: the connector learns to speak the LLM's language", stage("pretrain", out)),
        Step("instruct", "stage 2: the model learns to answer", stage("finetune", out)),
    ]


def stage(name: str, out: Path) -> list[str]:
    return [*LAUNCH, f"recipes/{name}.py", "--config", str(config(name, out)), "--overwrite"]


def config(name: str, out: Path) -> Path:
    """The recipe's YAML; for another folder than `HOME`, a copy in that folder which names it instead."""
    recipe = Path(f"recipes/tiny/{name}.yaml")
    if out == HOME:
        return recipe
    out.mkdir(parents=True, exist_ok=True)
    copy = out / recipe.name
    copy.write_text(recipe.read_text().replace(str(HOME), str(out)))
    return copy


def run(step: Step) -> None:
    """Run one command with this environment's programs, its output passed through; stop the demo if it fails."""
    typed = shlex.join(step.command)
    console.print(f"$ {typed}", style="cyan", markup=False, highlight=False, soft_wrap=True)
    code = subprocess.run([program(step.command[0]), *step.command[1:]]).returncode
    if code:
        console.print(f"\n{step.name} failed with exit code {code}: {typed}", style="bold red", markup=False)
        sys.exit(code if code > 0 else 1)


def program(name: str) -> str:
    """`python`, `accelerate` and `mllm` of the environment that runs this file, activated or not."""
    return sys.executable if name == "python" else str(Path(sys.executable).with_name(name))


def evaluate_all(model: Path, data: Path) -> dict[str, Result]:
    """Ask the model four times: two held-out sets, and the plain one without the pictures it belongs to."""
    from mllm.generate import Assistant

    quiet_libraries()
    assistant = Assistant.load(model)
    plain, compositional = (read_llava(data / f"{split}.json") for split in ("plain", "compositional"))
    asked: dict[str, list[Sample]] = {
        "plain": plain,
        "compositional": compositional,
        "shuffled": shuffle_images(plain, SHUFFLE_SEED),
        "blank": blank_images(plain),
    }
    with Progress(console=console) as bars:
        return {name: evaluate(assistant, samples, progress=follow(bars, name)) for name, samples in asked.items()}


def chats(model: Path, results: dict[str, Result]) -> list[Step]:
    """One question of each held-out set, asked through the command line."""
    asked = [results[name]["answers"][0] for name in ("plain", "compositional")]
    return [
        Step(
            "chat",
            answer["question"],
            ["mllm", "chat", "--model", str(model), "--image", str(answer["image"]), "--prompt", answer["question"]],
        )
        for answer in asked
    ]


def report(out: Path, results: dict[str, Result], seconds: dict[str, float]) -> None:
    """Write the three reports and print the table."""
    curves = {name: out / name / "metrics.jsonl" for name in STAGES}
    page, figure = write_report(out, TITLE, results, curves, seconds, meaning=MEANING)
    numbers = out / "report.json"
    numbers.write_text(json.dumps(summary(results, seconds), indent=2) + "\n", encoding="utf-8")
    console.print(table(results))
    console.print(f"{seconds['total']:.0f} s in all; read {page}, {figure}, {numbers}", soft_wrap=True)


def summary(results: dict[str, Result], seconds: dict[str, float]) -> dict[str, Any]:
    """What `report.json` holds; accuracies are fractions."""
    return {
        "accuracy": {name: result["accuracy"] for name, result in results.items()},
        "interval": {name: result["interval"] for name, result in results.items()},
        "number": {name: result["number"] for name, result in results.items()},
        "by_type": {name: result["by_type"] for name, result in results.items()},
        "seconds": seconds,
        "machine": machine(),
    }


def machine() -> dict[str, Any]:
    """What the seconds were measured on."""
    import torch
    import transformers

    return {
        "system": platform.platform(),
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def table(results: dict[str, Result]) -> Table:
    drawn = Table("asked", "right", "of", "accuracy", "95 % interval", "what it is", title="Accuracy")
    for name, result in results.items():
        low, high = result["interval"]
        counts = f"{result['correct']:,}", f"{result['number']:,}"
        drawn.add_row(name, *counts, f"{result['accuracy']:.1%}", f"{low:.1%} – {high:.1%}", MEANING[name])
    return drawn


if __name__ == "__main__":
    tyro.cli(main)
