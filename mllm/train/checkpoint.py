"""Checkpoints: what a run that was cut off goes on from.

`checkpoints/step-N/` holds what trains, the optimiser's moments, the step and the plan's position, and a manifest with
the size and the hash of each file. It appears whole (`durable.py`); what was spoilt later is found by its manifest when
a run resumes, is named, and is passed over for the next older one. It does not depend on how many ranks there were or
how DeepSpeed cut the tensors up: every rank calls, the main one writes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from mllm.models.multimodal import MultimodalLM
from mllm.train.engines.shards import load_moments, moments, whole
from mllm.train.saving import durable
from mllm.train.saving.retention import KEEP, retain
from mllm.train.saving.tensors import load_tensors, save_tensors
from mllm.train.trainable import trained_weights

T = TypeVar("T")

TOLD = ("metrics.jsonl", "quarantine.jsonl", "guard.jsonl")
"""Files of the run that a checkpoint relies on: their lines up to its step must outlive what it outlives."""
EXAMINED: dict[tuple[object, ...], str] = {}
"""What is wrong with a folder, by its files as they lie there: a large one is read and hashed once a process."""


def save_checkpoint(
    folder: Path,
    step: int,
    model: MultimodalLM,
    optimizer: torch.optim.Optimizer,
    trained: list[nn.Parameter],
    fingerprint: str,
    position: dict[str, Any] | None = None,
    is_main: bool = True,
    metric: float | None = None,
    keep_last: int = KEEP,
    keep_best: int = 0,
) -> None:
    """Everything needed to go on after `step` steps as if nothing had happened. `trained` are the parameters in the
    order of the optimiser's groups; `position` is the plan's: what it worked out so far, so that a late step is found
    at once; by `metric`, the lower the better, the best ones are kept."""
    weights = whole(dict(trained_weights(model)), is_main)
    state = moments(optimizer, trained, step, is_main)
    if not is_main:
        return
    place = folder / "checkpoints" / f"step-{step}"
    place.parent.mkdir(parents=True, exist_ok=True)
    durable.heal(place.parent)
    for file in filter(Path.exists, (folder / name for name in TOLD)):
        durable.sync(file)
    beside = place.with_name(durable.UNFINISHED + place.name)
    beside.mkdir()
    save_tensors(weights, beside / "trained.safetensors")
    torch.save(state, beside / "optimizer.pt")
    told = {"step": step, "plan": fingerprint, "position": position, "metric": metric, "order": order(model, trained)}
    (beside / "state.json").write_text(json.dumps(told))
    durable.put_in_place(beside, place)
    retain(checkpoints(folder), place, keep_last, keep_best, spoilt=lambda path: bool(EXAMINED.get(key(path))))


def load_weights(folder: Path, model: MultimodalLM, fingerprint: str) -> int:
    """What trains, from the newest whole checkpoint; the number of steps it has behind it, 0 if there is none. Before
    the model is wrapped: what wraps it then shards, casts or copies the right weights.

    Raises:
        ValueError: the checkpoint was made with another plan (data, seed or layout), so its step means nothing here;
            or other weights train now.
    """
    if not (found := newest(folder)):
        return 0
    state = newest_state(folder, fingerprint)
    load_tensors(dict(trained_weights(model)), found / "trained.safetensors")
    return int(state["step"])


def load_optimizer(
    folder: Path, model: MultimodalLM, optimizer: torch.optim.Optimizer, trained: list[nn.Parameter]
) -> None:
    """The optimiser's moments, from the newest whole checkpoint.

    Raises:
        ValueError: the weights stand in other groups now, so that each would get another one's moments.
    """
    found = newest(folder)
    assert found, f"no checkpoint in {folder}, though its weights were loaded"
    saved = json.loads((found / "state.json").read_text()).get("order")
    if saved and saved != order(model, trained):
        raise ValueError(
            f"{found} was made with other patterns or another layer_decay in train.learning_rate, which put the "
            f"weights into other groups: resume with those in {folder / 'config.yaml'}, or start again with --overwrite"
        )
    state = torch.load(found / "optimizer.pt", weights_only=True)["state"]
    load_moments(optimizer, trained, state)


def order(model: MultimodalLM, trained: list[nn.Parameter]) -> str:
    """The weights by name, as the optimiser's state numbers them, in sixteen characters."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return hashlib.sha256("\n".join(names[id(p)] for p in trained).encode()).hexdigest()[:16]


def newest_state(folder: Path, fingerprint: str) -> dict[str, Any]:
    """`step` and `position` of the newest whole checkpoint, both empty if there is none.

    Raises:
        ValueError: it was made with another plan.
    """
    if not (found := newest(folder)):
        return {"step": 0, "position": None}
    state: dict[str, Any] = json.loads((found / "state.json").read_text())
    if state["plan"] != fingerprint:
        raise ValueError(
            f"{found} was made with other data, another tokenizer, mixture, seed, seq_length or rows_per_step: "
            f"resume with the settings in {folder / 'config.yaml'}, or start again with --overwrite"
        )
    return state


def newest(folder: Path) -> Path | None:
    """The newest whole checkpoint, the same one on every rank: the main process looks, and names what it passes over.
    None where nothing was saved yet.

    Raises:
        ValueError: there are checkpoints, and none is whole.
    """
    return from_main(lambda: newest_whole(folder))


def newest_whole(folder: Path) -> Path | None:
    found = checkpoints(folder)
    for path in reversed(found):
        known = key(path) in EXAMINED
        wrong = EXAMINED.setdefault(key(path), "" if known else durable.damage(path))
        if not wrong:
            return path
        if not known:
            print(f"warning: checkpoint {path} is passed over: {wrong}", flush=True)
    if not found:
        return None
    told = "\n  ".join(f"{path.name}: {EXAMINED[key(path)]}" for path in found)
    raise ValueError(
        f"no checkpoint in {folder / 'checkpoints'} is whole:\n  {told}\n"
        f"Bring one back from a copy, or start again with --overwrite"
    )


def checkpoints(folder: Path) -> list[Path]:
    """All folders of checkpoints, oldest first; whether one is whole is told by `newest`."""
    found = durable.candidates(folder / "checkpoints", "step-*")
    return sorted((path for path in found if durable.own_name(path)[5:].isdigit()), key=step_of)


def step_of(path: Path) -> int:
    return int(durable.own_name(path)[5:])


def key(path: Path) -> tuple[object, ...]:
    """A folder as it lies there: its files with their sizes and times."""
    files = sorted(file for file in path.rglob("*") if file.is_file())
    return path, *((file.name, (found := file.stat()).st_size, found.st_mtime_ns) for file in files)


def from_main(find: Callable[[], T]) -> T:
    """What the main process finds, on every rank; its `ValueError` too."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return find()
    told: list[Any] = [None, None]
    if torch.distributed.get_rank() == 0:
        try:
            told[0] = find()
        except ValueError as error:
            told[1] = str(error)
    torch.distributed.broadcast_object_list(told)
    if told[1] is not None:
        raise ValueError(told[1])
    return told[0]  # type: ignore[no-any-return]
