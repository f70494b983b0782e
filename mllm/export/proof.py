"""Before a folder is called exported: fresh processes load it without mllm, and must say what the trained model says.

Enters: a `Trained` model and the folder that was made of it. Leaves: a `Proof` for each version of transformers that
was asked: tokens equal, pixels and logits equal to `TOLERANCE`, greedy answers equal, every weight in its place.
"""

from __future__ import annotations

import copy
import json
import os
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

from mllm.export.environments import Environment
from mllm.export.trained import Trained, round_weights
from mllm.generate import Assistant
from mllm.types import Example, Mark, Message, Sample

TOLERANCE = 1e-5
"""Of logits in float32, as a share of the largest logit where that is above 1; of pixels as they are."""
NEW_TOKENS = 16
SCRIPT = Path(__file__).with_name("reload.py")
SECONDS = 3600


@dataclass(frozen=True)
class Proof:
    """What one version of transformers made of the exported folder."""

    environment: str
    transformers: str
    faults: tuple[str, ...]
    logits: float = 0.0
    """Largest difference of a logit, relative as `TOLERANCE` is."""
    samples: int = 0

    def __str__(self) -> str:
        if self.faults:
            return f"transformers {self.transformers} ({self.environment}): " + "; ".join(self.faults)
        return (
            f"transformers {self.transformers}: {self.samples} conversations, tokens and greedy answers equal, "
            f"logits within {self.logits:.1e}"
        )


def prove(trained: Trained, folder: Path, environments: list[Environment], dtype: torch.dtype) -> list[Proof]:
    """One proof for each environment. The model is consumed: its weights are rounded to `dtype`."""
    with tempfile.TemporaryDirectory() as place:
        write_reference(trained, Path(place), dtype)
        return [judge(environment, run(environment, folder, Path(place))) for environment in environments]


def questions(folder: Path) -> list[Sample]:
    """Words alone; one picture; two pictures, of which one belongs to an earlier turn."""
    wide, tall = picture(folder / "wide.png", (97, 61)), picture(folder / "tall.png", (40, 123))
    first = [Message("user", [Mark.IMAGE, "\n", "What is this?"])]
    answered = [*first, Message("assistant", ["A picture."])]
    return [
        Sample("words", [Message("user", ["How many legs does a dog have?"])]),
        Sample("picture", first, [wide]),
        Sample("pictures", [*answered, Message("user", [Mark.IMAGE, "\n", "And this?"])], [wide, tall]),
    ]


def picture(path: Path, size: tuple[int, int]) -> str:
    """Noise over a slope of brightness: no two patches are alike."""
    width, height = size
    noise = np.random.default_rng(width).integers(0, 128, (height, width, 3))
    slope = np.linspace(0, 127, width)[None, :, None]
    Image.fromarray((noise + slope).astype(np.uint8)).save(path)
    return str(path)


@torch.inference_mode()
def write_reference(trained: Trained, folder: Path, dtype: torch.dtype, new_tokens: int = NEW_TOKENS) -> None:
    """What our own model says, with weights rounded as the exported ones are."""
    round_weights(trained.model, dtype)
    assistant = Assistant(trained.model, trained.processor)
    tensors, told = {}, []
    for number, sample in enumerate(questions(folder)):
        prompt = trained.processor.prompt(sample)
        inputs = assistant.inputs([prompt])
        tensors[f"{number}/logits"] = trained.model.llm(**inputs).logits[0].float().contiguous()
        if sample.images:
            tensors[f"{number}/pixel_values"] = trained.exported_pixels(prompt.pixel_values)
        told.append(
            {
                "messages": as_parts(sample),
                "input_ids": prompt.input_ids,
                "tiles": tiles_of(trained, prompt),
                "answer": assistant.answer([sample], new_tokens)[0],
                "max_new_tokens": new_tokens,
            }
        )
    save_file(tensors, str(folder / "reference.safetensors"))
    (folder / "reference.json").write_text(json.dumps({"samples": told}))


def tiles_of(trained: Trained, prompt: Example) -> list[int]:
    """Of each image whose tiles stand together in one padded row of pixels; of others nothing."""
    layout = trained.processor.slots.any_resolution
    return [layout.num_tiles(width, height) for height, width in prompt.image_sizes] if layout else []


def as_parts(sample: Sample) -> list[dict[str, Any]]:
    """The conversation as stock processors take it; the newline behind an image is theirs to put."""
    images, messages = iter(copy.copy(sample.images)), []
    for message in sample.messages:
        content = [
            {"type": "image", "path": str(next(images))} if part is Mark.IMAGE else {"type": "text", "text": part}
            for part in message.content
            if part != "\n"
        ]
        messages.append({"role": message.role, "content": content})
    return messages


def run(environment: Environment, folder: Path, reference: Path) -> dict[str, Any]:
    """What the fresh process reports, or how it ended."""
    with tempfile.TemporaryDirectory() as modules:
        quiet = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": modules, "TRANSFORMERS_VERBOSITY": "error"}
        # absolute, since the process runs elsewhere; no link is followed: a venv's Python is one
        packages = [Path(path) for path in environment.packages]
        paths = [str(path.absolute()) for path in (SCRIPT, folder, reference, *packages)]
        command = [str(Path(environment.python).absolute()), "-I", *paths]
        done = subprocess.run(command, capture_output=True, text=True, env=quiet, timeout=SECONDS, cwd=modules)
    try:
        return dict(json.loads(done.stdout.strip().splitlines()[-1]))
    except (IndexError, ValueError):
        return {"error": (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]}


def judge(environment: Environment, found: dict[str, Any]) -> Proof:
    """All that speaks against calling the folder exported."""
    version = str(found.get("transformers", "?"))
    if "error" in found:
        return Proof(environment.name, version, (str(found["error"])[:500],))
    faults = [f"{name.replace('_', ' ')}: {', '.join(keys[:3])}" for name, keys in found["keys"].items()]
    if found["mllm"]:
        faults.append("it imported mllm")
    samples = found["samples"]
    for name, sample in zip(("words", "one picture", "two pictures"), samples, strict=True):
        faults += [f"{name}: {fault}" for fault in sample_faults(sample)]
    return Proof(
        environment.name, version, tuple(faults), max(sample.get("logits", 0.0) for sample in samples), len(samples)
    )


def sample_faults(sample: dict[str, Any]) -> list[str]:
    if not sample["input_ids"]:
        return ["another prompt (token ids differ)"]
    faults = [
        f"{what} differ by {sample[what]:.1e} (at most {TOLERANCE:g})"
        for what in ("pixels", "logits")
        if not sample[what] <= TOLERANCE
    ]
    return faults if sample["same_answer"] else [*faults, f"another answer ({sample['answer']!r})"]
