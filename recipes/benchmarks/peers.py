"""Our training beside what people use, on the same model, samples and tokens, in one run.

Enters: how many steps to measure. Leaves: one mapping of numbers: supervised tokens a CPU second of each way
(`peers_ways`), ratios of neighbours in time (`peers_turns`), memory, losses. The losses of all ways must agree step by
step, else a speed would be that of another computation.

Imports, loading of the model and the index come before the first step and are counted for none; nor is the first step
itself, nor what follows the last.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.clock import speed
from benchmarks.peers_turns import Trained, in_turn
from benchmarks.peers_ways import WAYS

TOLERANCE = 1e-5
"""By which the losses of a step may differ, of their size. All ways sum over the same tokens in float32, in another
order: that leaves some 1e-7 in a step, and what the steps before it pass on. A token more or less, or a sample that
sees another, is 1e-3."""
INSTALL = {"trl": "pip install 'mllm[bench]'"}
"""What a way needs beside ours, and where it comes from."""


@dataclass
class Losses:
    """What a way returned: of each step the loss and the tokens that it is the mean of."""

    loss: list[float]
    tokens: list[int]

    @classmethod
    def of(cls, trained: Trained) -> Losses:
        return cls(*map(list, zip(*trained.returned, strict=True)))


def measure(steps: int, tick: Callable[[str], None], **llm: int) -> dict[str, Any]:
    """All numbers; `tick` is told what goes on, `llm` changes the LLM's shape."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    from benchmarks.peers_drawn import draw, samples_for, write_batches, write_recipe

    tick("drawing a model and conversations")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        draw(folder, samples_for(steps + 1), **llm)
        write_recipe(folder, steps + 1)
        write_batches(folder, steps + 1)
        tick("starting the ways")
        ways = {name: way for name, way in WAYS.items() if name not in missing()}
        trained = in_turn(ways, folder, steps + 1, lambda step: tick(f"step {step} of {steps}"))
        return {**compared(trained), **padding(folder), "steps": steps, "missing": missing()}


def missing() -> dict[str, str]:
    """Ways that are left out here, and how to install what they need."""
    return {name: how for name, how in INSTALL.items() if not find_spec(name)}


def compared(trained: dict[str, Trained]) -> dict[str, Any]:
    """Ratios, rates, memory and losses."""
    losses = {name: Losses.of(each) for name, each in trained.items()}
    tokens = losses["ours"].tokens[1:]  # of the steps that were timed
    seconds = {
        name: [spent / number for spent, number in zip(each.seconds, tokens, strict=True)]
        for name, each in trained.items()
    }
    speeds = {f"ours_vs_{name}": speed(seconds["ours"], seconds[name]) for name in WAYS if name in seconds}
    speeds.pop("ours_vs_ours")
    return {
        **{f"ours_vs_{name}": None for name in WAYS if name != "ours"},
        **{name: each["median"] for name, each in speeds.items()},
        "ranges": {name: [each["least"], each["greatest"]] for name, each in speeds.items()},
        "supervised_tokens_per_cpu_second": {name: 1 / median(each) for name, each in seconds.items()},
        "cpu_seconds_per_supervised_token": {name: median(each) for name, each in seconds.items()},
        "cpu_seconds_per_step": {name: median(each.seconds) for name, each in trained.items()},
        "peak_bytes": {name: each.peak_bytes for name, each in trained.items()},
        "training_bytes": {name: each.training_bytes for name, each in trained.items()},
        "final_loss": {name: each.loss[-1] for name, each in losses.items()},
        "loss_difference": {name: difference(losses["ours"], each) for name, each in losses.items()},
        "tolerance": TOLERANCE,
        "supervised_tokens": sum(tokens),
        "seconds": {name: each.seconds for name, each in trained.items()},
    }


def difference(ours: Losses, theirs: Losses) -> float:
    """The largest of all steps, of the loss; infinite where the tokens are not the same."""
    if ours.tokens != theirs.tokens:
        return float("inf")
    return max(abs(mine - other) / mine for mine, other in zip(ours.loss, theirs.loss, strict=True))


def padding(folder: Path) -> dict[str, float]:
    """Real tokens a step, and how many times as many positions the padded batches hold."""
    from benchmarks.peers_drawn import length_of

    lengths = [length_of(record) for record in json.loads((folder / "data.json").read_text())]
    batches = [[lengths[place] for place in batch] for batch in json.loads((folder / "batches.json").read_text())]
    real, held = sum(map(sum, batches)), sum(max(batch) * len(batch) for batch in batches)
    return {"real_tokens": real, "padded_over_real": held / real, "samples": sum(map(len, batches))}


def disagreement(found: dict[str, Any]) -> str:
    """In words, whose losses are not ours; nothing where all agree."""
    wrong = [f"{name} by {by:.1e}" for name, by in found["loss_difference"].items() if not by <= found["tolerance"]]
    return f"losses differ from ours by more than {found['tolerance']:.0e}: {', '.join(wrong)}" if wrong else ""
