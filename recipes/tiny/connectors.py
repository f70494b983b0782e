"""Every connector on the same data and parts: align, instruct, ask; a table of what each can tell.

Enters: `runs/tiny/data` and `runs/tiny/parts`, as `recipes/tiny/demo.py` leaves them. Leaves, for each connector, its
two stages and `result.json` under `--out`, and the table of all results between two marks of `recipes/README.md`.

    python recipes/tiny/connectors.py --only mlp qformer

The connectors differ in the number of visual tokens, the two that look through learned queries also in steps and rate:
they start without any idea of places, which the others are given by the order of the patches.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tyro

from demo import ENVIRONMENT, HOME, LAUNCH, SHUFFLE_SEED, STAGES, Step, run
from mllm.data.formats.llava import read_llava
from mllm.evaluate.controls import shuffle_images
from mllm.evaluate.exact import evaluate

README = Path("recipes/README.md")
MARK = "tiny-connectors"
ASKED = ("plain", "compositional", "shuffled")


@dataclass(frozen=True)
class Trial:
    """One connector's flags; what they leave out is the YAMLs'."""

    connector: dict[str, Any]
    align: dict[str, Any] = field(default_factory=dict)

    @property
    def told(self) -> str:
        return ", ".join(f"{name} {value}" for name, value in self.connector.items() if name != "type")


SIZES = {"hidden_size": 128, "num_layers": 2, "num_heads": 4}
LOOKING = {"learning_rate.connector": 2e-3, "steps": 120}
"""Attention over patches has to be learned first."""
TRIALS = {
    "mlp": Trial({"type": "mlp"}),
    "avg_pool": Trial({"type": "avg_pool", "tokens": 4}),
    "pixel_shuffle": Trial({"type": "pixel_shuffle", "factor": 2}),
    "qformer": Trial({"type": "qformer", "num_queries": 8, "cross_attention_every": 1, **SIZES}, LOOKING),
    "resampler": Trial({"type": "resampler", "num_queries": 8, **SIZES}, LOOKING),
}


def main(
    out: Path = HOME / "connectors", only: tuple[str, ...] = tuple(TRIALS), instruct_steps: int | None = None
) -> None:
    """Train and ask the tiny model with one connector after the other.

    Args:
        out: Where the stages and results go, a folder a connector.
        only: The connectors to run; the table shows these and the earlier results in `out`.
        instruct_steps: Steps of the second stage, in place of the YAML's.
    """
    os.environ.update(ENVIRONMENT)
    for name in only:
        for step in training_steps(name, out / name, instruct_steps):
            run(step)
        (out / name / "result.json").write_text(json.dumps(ask(out / name), indent=1))
    files = {name: out / name / "result.json" for name in TRIALS}
    written = table({name: json.loads(file.read_text()) for name, file in files.items() if file.exists()})
    print(written)
    README.write_text(put_between(README.read_text(), written, MARK))


def training_steps(name: str, out: Path, instruct_steps: int | None = None) -> list[Step]:
    """The two commands that could be typed by hand."""
    trial, align, instruct = TRIALS[name], out / "align", out / "instruct"
    steps = {} if instruct_steps is None else {"train.steps": instruct_steps}
    first = flags({**prefixed("model.connector", trial.connector), **prefixed("train", trial.align)}, align)
    second = ["--init_from", str(align), *flags(steps, instruct)]
    return [
        Step("align", name, [*LAUNCH, "recipes/pretrain.py", "--config", "recipes/tiny/pretrain.yaml", *first]),
        Step("instruct", name, [*LAUNCH, "recipes/finetune.py", "--config", "recipes/tiny/finetune.yaml", *second]),
    ]


def prefixed(section: str, values: dict[str, Any]) -> dict[str, Any]:
    return {f"{section}.{name}": value for name, value in values.items()}


def flags(values: dict[str, Any], out: Path) -> list[str]:
    named = {**values, "train.output_dir": out}
    return [word for name, value in named.items() for word in (f"--{name}", str(value))] + ["--overwrite"]


def ask(out: Path, data: Path = HOME / "data") -> dict[str, Any]:
    """Accuracies as fractions, all and by type of question, and what they cost: steps, visual tokens, parameters."""
    from mllm.config import load_config
    from mllm.generate import Assistant

    assistant = Assistant.load(out / "instruct")
    plain, compositional = (read_llava(data / f"{split}.json") for split in ("plain", "compositional"))
    asked = dict(zip(ASKED, (plain, compositional, shuffle_images(plain, SHUFFLE_SEED)), strict=True))
    results = {name: evaluate(assistant, samples) for name, samples in asked.items()}
    return {
        "tokens": assistant.processor.num_visual_tokens,
        "parameters": sum(p.numel() for p in assistant.model.connector.parameters()),
        "steps": {stage: load_config(out / stage / "config.yaml").train.steps for stage in STAGES},
        "accuracy": {name: result["accuracy"] for name, result in results.items()},
        "by_type": {
            name: {type_: score["accuracy"] for type_, score in r["by_type"].items()} for name, r in results.items()
        },
    }


def table(results: dict[str, dict[str, Any]]) -> str:
    """Markdown, a row a connector."""
    header = ["connector", "visual tokens an image", "parameters", "steps of align, instruct", *ASKED]
    rows = [header, ["---"] * len(header)]
    for name, result in results.items():
        told = TRIALS[name].told
        shown = f"`{name}` ({told})" if told else f"`{name}`"
        costs = [str(result["tokens"]), f"{result['parameters']:,}", ", ".join(map(str, result["steps"].values()))]
        rows.append([shown, *costs, *[f"{result['accuracy'][split]:.1%}".replace("%", " %") for split in ASKED]])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def put_between(page: str, content: str, mark: str) -> str:
    """The page with `content` between the two comments that bear the mark, in place of what stood there."""
    begin, end = f"<!-- {mark} -->\n", f"<!-- /{mark} -->"
    before, _, rest = page.partition(begin)
    _, found, after = rest.partition(end)
    if not found:
        raise ValueError(f"{README} has no lines {begin.strip()} and {end}: put them where the table should stand")
    return f"{before}{begin}{content}\n{end}{after}"


if __name__ == "__main__":
    tyro.cli(main)
