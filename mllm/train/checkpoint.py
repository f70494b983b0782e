"""What a run leaves on disk: the stage folder at its end, and on the way the checkpoints that a cut-off run resumes
from.

Stage folder: `config.yaml`, `connector.safetensors`, `adapter/` (LoRA, peft's own layout) or `llm.safetensors` /
`vision_encoder.safetensors` where a part trained whole, `processor/`. Frozen weights are named in the config, not
copied.

Checkpoint `checkpoints/step-N/`: what trains, the optimiser's moments, the random state, the step. Both are written
beside their place and renamed into it, so that a folder of that name is whole.
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
from mllm.train.trainable import trained_weights

if TYPE_CHECKING:
    from mllm.data.processor import Processor

FINISHED = "connector.safetensors"
"""Every stage ends by writing this file: a folder without it did not finish."""
KEEP = 2
"""Checkpoints kept: the newest, and one more in case the disk spoils it."""


def save_stage(folder: Path, model: MultimodalLM, processor: Processor, config_yaml: str) -> None:
    """Write the stage folder; `FINISHED` comes last."""
    (folder / "config.yaml").write_text(config_yaml)
    processor.save(folder / "processor")
    for name in ("vision_encoder", "llm"):
        save_part(folder, name, getattr(model, name))
    save_whole(model.connector, folder / FINISHED)


def save_part(folder: Path, name: str, part: nn.Module) -> None:
    """An LLM's adapter, or the whole part if it differs from its Hub id; nothing for a frozen one."""
    from peft import PeftModel

    if isinstance(part, PeftModel):
        part.save_pretrained(folder / "adapter")
    elif any(p.requires_grad for p in part.parameters()) or getattr(part, "differs_from_hub", False):
        save_whole(part, folder / f"{name}.safetensors")


def save_whole(module: nn.Module, path: Path) -> None:
    """Every parameter once (tied ones under their first name), through a file beside it."""
    beside = path.with_suffix(".partial")
    save_file({name: p.detach().cpu().contiguous() for name, p in module.named_parameters()}, str(beside))
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
    saved = load_file(str(path))
    own = dict(module.named_parameters())
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
        for name, parameter in own.items():
            parameter.copy_(saved[name])


def save_checkpoint(
    folder: Path, step: int, model: MultimodalLM, optimizer: torch.optim.Optimizer, fingerprint: str
) -> None:
    """Everything needed to go on after `step` steps as if nothing had happened."""
    beside = folder / "checkpoints" / f".partial-{step}"
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    save_file(
        {name: p.detach().cpu().contiguous() for name, p in trained_weights(model).items()},
        str(beside / "trained.safetensors"),
    )
    torch.save(optimizer.state_dict(), beside / "optimizer.pt")
    torch.save(random_state(), beside / "random.pt")
    (beside / "state.json").write_text(json.dumps({"step": step, "plan": fingerprint}))
    for file in beside.iterdir():
        with file.open("rb") as written:
            os.fsync(written.fileno())
    place = folder / "checkpoints" / f"step-{step}"
    shutil.rmtree(place, ignore_errors=True)
    beside.rename(place)
    for old in checkpoints(folder)[:-KEEP]:
        shutil.rmtree(old)


def load_checkpoint(folder: Path, model: MultimodalLM, optimizer: torch.optim.Optimizer, fingerprint: str) -> int:
    """Continue the newest checkpoint; the number of steps it has behind it, 0 if there is none.

    Raises: ValueError: the checkpoint was made with another plan (data, seed or layout), so its position means
    nothing here.
    """
    found = checkpoints(folder)
    if not found:
        return 0
    newest = found[-1]
    state = json.loads((newest / "state.json").read_text())
    if state["plan"] != fingerprint:
        raise ValueError(
            f"{newest} was made with other data, another tokenizer, seed, seq_length or rows_per_step: "
            f"resume with the settings in {folder / 'config.yaml'}, or start again with --overwrite"
        )
    saved = load_file(str(newest / "trained.safetensors"))
    with torch.no_grad():
        for name, parameter in trained_weights(model).items():
            parameter.copy_(saved[name])
    optimizer.load_state_dict(torch.load(newest / "optimizer.pt", weights_only=True))
    set_random_state(torch.load(newest / "random.pt", weights_only=True))
    return int(state["step"])


def checkpoints(folder: Path) -> list[Path]:
    """Whole checkpoints, oldest first."""
    return sorted((folder / "checkpoints").glob("step-*"), key=lambda path: int(path.name.partition("-")[2]))


def random_state() -> dict[str, Any]:
    """torch's generators; nothing else draws in the loop."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {"cpu": torch.get_rng_state(), "cuda": cuda}


def set_random_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["cpu"])
    if state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])
