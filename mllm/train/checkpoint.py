"""Checkpoints: what a run that was cut off goes on from.

`checkpoints/step-N/` holds what trains, the optimiser's moments, the step and the plan's position. It is written
beside its place and renamed into it, so that a folder of that name is whole. It does not depend on how many ranks there
were or how DeepSpeed cut the tensors up: every rank calls, the main one writes.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mllm.models.multimodal import MultimodalLM
from mllm.train.shards import load_moments, moments, whole
from mllm.train.tensors import load_tensors, save_tensors
from mllm.train.trainable import trained_weights

KEEP = 2
"""Checkpoints kept: the newest, and one more in case the disk spoils it."""


def save_checkpoint(
    folder: Path,
    step: int,
    model: MultimodalLM,
    optimizer: torch.optim.Optimizer,
    trained: list[nn.Parameter],
    fingerprint: str,
    position: dict[str, Any] | None = None,
    is_main: bool = True,
) -> None:
    """Everything needed to go on after `step` steps as if nothing had happened. `trained` are the parameters in the
    order of the optimiser's groups; `position` is the plan's: what it worked out so far, so that a late step is found
    at once."""
    weights = whole(dict(trained_weights(model)), is_main)
    state = moments(optimizer, trained, step, is_main)
    if not is_main:
        return
    beside = folder / "checkpoints" / f".partial-{step}"
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    save_tensors(weights, beside / "trained.safetensors")
    torch.save(state, beside / "optimizer.pt")
    (beside / "state.json").write_text(json.dumps({"step": step, "plan": fingerprint, "position": position}))
    for file in beside.iterdir():
        with file.open("rb") as written:
            os.fsync(written.fileno())
    place = folder / "checkpoints" / f"step-{step}"
    shutil.rmtree(place, ignore_errors=True)
    beside.rename(place)
    for old in checkpoints(folder)[:-KEEP]:
        shutil.rmtree(old)


def load_weights(folder: Path, model: MultimodalLM, fingerprint: str) -> int:
    """What trains, from the newest checkpoint; the number of steps it has behind it, 0 if there is none. Before the
    model is wrapped: what wraps it then shards, casts or copies the right weights.

    Raises:
        ValueError: the checkpoint was made with another plan (data, seed or layout), so its step means nothing here;
            or other weights train now.
    """
    if not (found := checkpoints(folder)):
        return 0
    state = newest_state(folder, fingerprint)
    load_tensors(dict(trained_weights(model)), found[-1] / "trained.safetensors")
    return int(state["step"])


def load_optimizer(folder: Path, optimizer: torch.optim.Optimizer, trained: list[nn.Parameter]) -> None:
    """The optimiser's moments, from the newest checkpoint."""
    state = torch.load(checkpoints(folder)[-1] / "optimizer.pt", weights_only=True)["state"]
    load_moments(optimizer, trained, state)


def newest_state(folder: Path, fingerprint: str) -> dict[str, Any]:
    """`step` and `position` of the newest checkpoint, both empty if there is none.

    Raises:
        ValueError: it was made with another plan.
    """
    if not (found := checkpoints(folder)):
        return {"step": 0, "position": None}
    state: dict[str, Any] = json.loads((found[-1] / "state.json").read_text())
    if state["plan"] != fingerprint:
        raise ValueError(
            f"{found[-1]} was made with other data, another tokenizer, mixture, seed, seq_length or rows_per_step: "
            f"resume with the settings in {folder / 'config.yaml'}, or start again with --overwrite"
        )
    return state


def checkpoints(folder: Path) -> list[Path]:
    """Whole checkpoints, oldest first."""
    whole = [
        path.parent for path in (folder / "checkpoints").glob("step-*/state.json") if path.parent.name[5:].isdigit()
    ]
    return sorted(whole, key=lambda path: int(path.name[5:]))
