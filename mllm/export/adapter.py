"""The LoRA alone, as peft and servers take it, and beside it the multimodal model that it belongs to.

Enters: the name of a finished stage whose LLM has an adapter. Leaves: `adapter_config.json` and
`adapter_model.safetensors` for the exported class, and `base/`, that class with encoder, connector and the LLM
without the adapter. The connector lies in the base, not in the adapter: vLLM refuses adapters with
`modules_to_save`. The targets name the language model's layers alone: `q_proj` would match the encoder's too.
"""

from __future__ import annotations

import gc
import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from mllm.export import Dtype, Exported, environments
from mllm.export.processor_files import write_json
from mllm.export.proof import prove
from mllm.export.trained import Trained, load
from mllm.export.transformers_folder import exported_as, notes, write_files
from mllm.generate import find_folder
from mllm.train.stage_folder import ADAPTERS

BASE = "base"


def write(model: str, folder: Path, dtype: Dtype, check_with: list[str]) -> Exported:
    """Write base and adapter, then have fresh processes put them together.

    Raises:
        ValueError: the stage has no adapter on its LLM.
    """
    source = find_folder(model) / ADAPTERS["llm"]
    if not source.is_dir():
        raise ValueError(f"{model} has no adapter (no {source.name}/): --to merged or transformers exports it whole")
    chosen, left_out = environments.choose(check_with)
    base = load(model, "left out")
    kind = getattr(torch, base.parts.dtype if dtype == "auto" else dtype)
    home = write_files(base, folder / BASE, kind)
    write_adapter(source, folder, base)
    del base
    gc.collect()
    whole = load(model, "beside", rounded_to=kind)  # as peft has it, since merging rounds otherwise
    proofs = prove(whole, folder, chosen, torch.float32)
    dora = ("vLLM takes no DoRA adapters: --to transformers merges it",) if is_dora(source) else ()
    return Exported(folder, "adapter", exported_as(home), home.why, tuple(proofs), (*notes(home, left_out), *dora))


def is_dora(source: Path) -> bool:
    return bool(json.loads((source / "adapter_config.json").read_text()).get("use_dora"))


def write_adapter(source: Path, folder: Path, base: Trained) -> None:
    """peft's two files, with the names that the LLM's layers have inside the exported class."""
    prefix = f"base_model.model.{base.model.llm.base_model_prefix}."
    weights = load_file(str(source / "adapter_model.safetensors"))
    renamed = {rename(name, prefix): tensor for name, tensor in weights.items()}
    save_file(renamed, str(folder / "adapter_model.safetensors"), {"format": "pt"})
    config = json.loads((source / "adapter_config.json").read_text())
    write_json(folder / "adapter_config.json", {**config, **changes(renamed)})


def rename(name: str, prefix: str) -> str:
    assert name.startswith(prefix), f"{name} is not of the decoder"
    return f"base_model.model.model.language_model.{name.removeprefix(prefix)}"


def changes(names: Any) -> dict[str, Any]:
    """What in `adapter_config.json` is another model's now."""
    layers = sorted({re.sub(r"\.(lora_\w+)(\.\w+)?$", "", name).rsplit(".", 1)[-1] for name in names})
    return {
        "base_model_name_or_path": BASE,
        "target_modules": rf".*language_model\..*\.({'|'.join(layers)})",
        "modules_to_save": None,
        "task_type": "CAUSAL_LM",
        "auto_mapping": None,
    }
