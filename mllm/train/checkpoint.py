"""What a run leaves on disk: the stage folder at its end, and on the way the checkpoints that a cut-off run resumes
from.

Stage folder: `config.yaml`, `connector.safetensors`, `adapter/` (LoRA, peft's own layout) or `llm.safetensors` /
`vision_encoder.safetensors` where a part trained whole, `processor/`. Frozen weights are named in the config, not
copied.

Checkpoint `checkpoints/step-N/`: what trains, the optimiser's moments, the step. Both are written
beside their place and renamed into it, so that a folder of that name is whole. Neither depends on how many ranks
there were or how DeepSpeed cut the tensors up: every rank calls, the main one writes.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from mllm.models.multimodal import MultimodalLM
from mllm.train.shards import load_moments, moments, whole
from mllm.train.trainable import trained_weights

if TYPE_CHECKING:
    from mllm.data.processor import Processor

FINISHED = "connector.safetensors"
"""Every stage ends by writing this file: a folder without it did not finish."""
KEEP = 2
"""Checkpoints kept: the newest, and one more in case the disk spoils it."""


def save_stage(folder: Path, model: MultimodalLM, processor: Processor, config_yaml: str, is_main: bool = True) -> None:
    """Write the stage folder; `FINISHED` comes last."""
    if is_main:
        (folder / "config.yaml").write_text(config_yaml)
        processor.save(folder / "processor")
    for name in ("vision_encoder", "llm"):
        save_part(folder, name, getattr(model, name), is_main)
    save_whole(model.connector, folder / FINISHED, is_main)


def save_part(folder: Path, name: str, part: nn.Module, is_main: bool = True) -> None:
    """An LLM's adapter, and the whole part if it differs from its Hub id; nothing for a frozen one."""
    from peft import PeftModel

    differs = getattr(part, "differs_from_hub", False)
    if isinstance(part, PeftModel):
        adapter = whole({name: p for name, p in part.named_parameters() if ".lora_" in name}, is_main)
        if is_main:
            part.save_pretrained(str(folder / "adapter"), state_dict=adapter)
    else:
        differs = differs or any(p.requires_grad for p in part.parameters())
    if differs:
        save_tensors(whole(without_adapter(part), is_main), folder / f"{name}.safetensors", is_main)


def without_adapter(part: nn.Module) -> dict[str, torch.Tensor]:
    """The weights under their own names, also where peft has wrapped them; its adapter is left out."""
    return {
        name.removeprefix("base_model.model.").replace(".base_layer.", "."): parameter
        for name, parameter in part.named_parameters()
        if ".lora_" not in name
    }


def save_whole(module: nn.Module, path: Path, is_main: bool = True) -> None:
    """Every parameter once (tied ones under their first name)."""
    save_tensors(whole(dict(module.named_parameters()), is_main), path, is_main)


def save_tensors(tensors: dict[str, torch.Tensor], path: Path, is_main: bool = True) -> None:
    """Through a file beside it, so that a file of that name is whole."""
    if is_main:
        beside = path.with_suffix(".partial")
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, str(beside))
        beside.rename(path)


def load_stage(model: MultimodalLM, folder: Path) -> None:
    """Read what `save_stage` wrote into a model built from the same config.

    Raises:
        ValueError: the folder is not a finished stage, or a shape does not fit (named, never left at random).
    """
    if not (folder / FINISHED).is_file():
        raise ValueError(f"{folder} is no finished stage: it has no {FINISHED}")
    load_whole(model.connector, folder / FINISHED)
    for name in ("vision_encoder", "llm"):
        if (folder / f"{name}.safetensors").is_file():
            load_whole(getattr(model, name), folder / f"{name}.safetensors")
            getattr(model, name).differs_from_hub = True
    if (folder / "adapter").is_dir():
        from peft import PeftModel

        model.llm = PeftModel.from_pretrained(model.llm, str(folder / "adapter"))  # type: ignore[arg-type]


def load_whole(module: nn.Module, path: Path) -> None:
    """Copy a part's weights into place after comparing every name and shape."""
    load_tensors(dict(module.named_parameters()), path)


def load_tensors(own: dict[str, torch.Tensor], path: Path) -> None:
    """Copy a file into tensors.

    Raises:
        ValueError: names or shapes differ; names them.
    """
    saved = load_file(str(path))
    wrong = [f"{name}: not in the file" for name in own.keys() - saved.keys()]
    wrong += [f"{name}: not in the model" for name in saved.keys() - own.keys()]
    wrong += [
        f"{name}: {tuple(saved[name].shape)} in the file, {tuple(own[name].shape)} in the model"
        for name in own.keys() & saved.keys()
        if saved[name].shape != own[name].shape
    ]
    if wrong:
        raise ValueError(f"{path} does not fit this model:\n  " + "\n  ".join(sorted(wrong)[:8]))
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(saved[name])


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
