"""What a finished stage leaves on disk, and how the next one, or a chat, reads it.

`config.yaml`, `connector.safetensors`, `adapter/` and `vision_adapter/` (LoRA, peft's own layout) or `llm.safetensors`
/ `vision_encoder.safetensors` where a part trained whole, `processor/`. Frozen weights are named in the config, not
copied. `config.json` tells transformers' Auto classes whose folder it is (`mllm/registration.py`). Nothing depends on
how many ranks there were or how DeepSpeed cut the tensors up: every rank calls, the main one writes.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml
from safetensors.torch import load_file
from torch import nn

from mllm.models.deferred import is_deferred, stand_ins
from mllm.models.multimodal import MultimodalLM
from mllm.models.quantised import fill, is_4bit, is_quantised, packed_parts, round_to_4bit
from mllm.registration import STAGE_TYPE
from mllm.train.engines.shards import whole
from mllm.train.saving.tensors import fill_tensors, load_tensors, save_tensors
from mllm.train.tuning.adapters import Lora, is_adapted, put, wrapped
from mllm.train.tuning.scales import plain

if TYPE_CHECKING:
    from mllm.data.processor import Processor

ADAPTERS = {"vision_encoder": "vision_adapter", "llm": "adapter"}
"""Where a part's adapter lies in the folder."""
TAKEN = ("connector", "image_newline", "llm", "vision_encoder")
"""What a later stage can take over."""
NEWLINE = "image_newline.safetensors"
"""Written by every stage whose tiles are laid out at any resolution."""
FINISHED = "connector.safetensors"
"""Every stage ends by writing this file: a folder without it did not finish."""


def save_stage(folder: Path, model: MultimodalLM, processor: Processor, config_yaml: str, is_main: bool = True) -> None:
    """Write the stage folder; `FINISHED` comes last."""
    if is_main:
        (folder / "config.yaml").write_text(config_yaml)
        processor.save(folder / "processor")
        (folder / "config.json").write_text(json.dumps({"model_type": STAGE_TYPE}) + "\n")
    for name in ADAPTERS:
        save_part(folder, model, name, is_main)
    if model.image_newline is not None:
        save_whole(model.image_newline, folder / NEWLINE, is_main)
    save_whole(model.connector, folder / FINISHED, is_main)


def save_part(folder: Path, model: MultimodalLM, name: str, is_main: bool = True) -> None:
    """A part's adapter, and the whole part if it differs from its Hub id; nothing for a frozen one."""
    part, inner = getattr(model, name), wrapped(model, name)
    differs = getattr(part, "differs_from_hub", False)
    if is_adapted(inner):
        adapter = whole({key: p for key, p in inner.named_parameters() if ".lora_" in key}, is_main)
        if is_main:
            inner.save_pretrained(str(folder / ADAPTERS[name]), state_dict=adapter)
    else:
        differs = differs or any(p.requires_grad for p in part.parameters())
    if differs:
        own = without_adapter(part)
        tensors = whole(own, is_main) | (packed_parts(own) if is_main else {})
        save_tensors(tensors, folder / f"{name}.safetensors", is_main)


def without_adapter(part: nn.Module) -> dict[str, torch.Tensor]:
    """The weights under their own names, also where peft has wrapped them; its adapter is left out."""
    return {plain(name): parameter for name, parameter in part.named_parameters() if ".lora_" not in name}


def save_whole(module: nn.Module, path: Path, is_main: bool = True) -> None:
    """Every parameter once (tied ones under their first name)."""
    save_tensors(whole(dict(module.named_parameters()), is_main), path, is_main)


def holds(folder: Path, name: str) -> bool:
    """Did the stage train this part, whole or by an adapter? Its connector is always written."""
    return (folder / f"{name}.safetensors").is_file() or (folder / ADAPTERS.get(name, f"{name}.safetensors")).exists()


def load_stage(model: MultimodalLM, folder: Path, parts: Sequence[str] = TAKEN) -> None:
    """Read what `save_stage` wrote into a model built from the same config; of several parts, those that are named.

    Raises:
        ValueError: the folder is not a finished stage, or a shape does not fit (named, never left at random).
    """
    if not (folder / FINISHED).is_file():
        raise ValueError(f"{folder} is no finished stage: it has no {FINISHED}")
    if "connector" in parts:
        load_whole(model.connector, folder / FINISHED)
    if "image_newline" in parts and model.image_newline is not None:
        if not (folder / NEWLINE).is_file():
            raise ValueError(f"{folder} has no {NEWLINE}: it was trained without data.tiles anyres")
        load_whole(model.image_newline, folder / NEWLINE)
    for name in ADAPTERS:
        if name in parts:
            load_part(model, folder, name)


def load_part(model: MultimodalLM, folder: Path, name: str) -> None:
    """Weights of a part that trained whole, and its adapter."""
    if (folder / f"{name}.safetensors").is_file():
        load_whole(getattr(model, name), folder / f"{name}.safetensors")
        getattr(model, name).differs_from_hub = True
    if not (folder / ADAPTERS[name]).is_dir():
        return
    if name == "llm" and was_quantised(folder) and not is_quantised(model.llm):
        round_to_4bit(model.llm)  # what the adapter was trained on
        model.llm.differs_from_hub = True
    from peft import PeftModel

    try:
        with stand_ins(wrapped(model, name)):
            put(model, name, PeftModel.from_pretrained(wrapped(model, name), str(folder / ADAPTERS[name])))
    except (RuntimeError, ValueError) as error:  # torch's list of shapes; peft's of layers that are not there
        shown = " ".join(line.strip() for line in str(error).splitlines()[:3])
        raise ValueError(f"{folder / ADAPTERS[name]} does not fit this {name}: {shown}") from error
    check_adapter(wrapped(model, name), folder / ADAPTERS[name])


def check_adapter(part: Any, folder: Path) -> None:
    """peft passes over what finds no place, and leaves at zero what finds no weight.

    Raises:
        ValueError: names of one side are not on the other.
    """
    from peft import get_peft_model_state_dict

    saved, own = (
        load_file(str(folder / "adapter_model.safetensors")).keys(),
        get_peft_model_state_dict(part, save_embedding_layers=False).keys(),
    )
    if differing := sorted(saved ^ own):
        raise ValueError(
            f"{folder} does not fit this model: {len(saved - own)} of its tensors have no place there and "
            f"{len(own - saved)} places no tensor, {differing[0]} among them"
        )


def was_quantised(folder: Path) -> bool:
    """Did the stage hold its LLM in four bits?"""
    config = yaml.safe_load((folder / "config.yaml").read_text()) or {}
    return bool((config.get("model") or {}).get("quantisation"))


def needs_weights(folder: Path | None, lora: Lora | None) -> str | None:
    """Why what an earlier stage left, or a new adapter, cannot be laid on an LLM whose weights are not read yet; None
    where it can."""
    earlier = folder / ADAPTERS["llm"] / "adapter_config.json" if folder else None
    found = earlier is not None and earlier.is_file()
    if (lora and lora.dora) or (found and json.loads(earlier.read_text()).get("use_dora")):  # type: ignore[union-attr]
        return "DoRA measures its weights"
    if folder and found and was_quantised(folder):
        return "the earlier stage's adapter was trained on 4-bit weights"
    return None


def load_whole(module: nn.Module, path: Path) -> None:
    """Copy a part's weights into place after comparing every name and shape; into four bits where it is quantised."""
    if is_deferred(module):
        return load_tensors(dict(module.named_parameters()), path)
    saved = load_file(str(path))
    if is_quantised(module):
        saved = fill(module, saved)
    elif any("bitsandbytes__" in name for name in saved):
        raise ValueError(f"{path} holds 4-bit weights: keep model.quantisation nf4 for this stage")
    own: dict[str, torch.Tensor] = {
        name: parameter for name, parameter in module.named_parameters() if not is_4bit(parameter)
    }
    fill_tensors(own, saved, path)
