"""A model as a folder that `transformers` alone loads, chats with and trains on.

Enters: the name of a finished stage. Leaves: `config.json`, weights in safetensors, processor, generation defaults,
and the proofs that fresh processes gave.
"""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mllm.export import Dtype, Exported, cohere, deepseek, environments, llava, processor_files
from mllm.export.homes import AYA_VISION, COHERE2_VISION, DEEPSEEK_VL, LLAVA, LLAVA_NEXT, VIP_LLAVA, Home, find_home
from mllm.export.proof import prove
from mllm.export.remote_code import writer
from mllm.export.trained import Trained, check_prompt, load
from mllm.generate import stop_ids

FORMS = {
    LLAVA: llava,
    LLAVA_NEXT: llava,
    VIP_LLAVA: llava,
    DEEPSEEK_VL: deepseek,
    COHERE2_VISION: cohere,
    AYA_VISION: cohere,
}
"""The room that writes config and tensors of a stock class."""


def write(model: str, folder: Path, dtype: Dtype, check_with: list[str]) -> Exported:
    """Write all files, then have them read."""
    chosen, left_out = environments.choose(check_with)
    trained = load(model)
    kind = getattr(torch, trained.parts.dtype if dtype == "auto" else dtype)
    home = write_files(trained, folder, kind)
    gc.collect()
    proofs = prove(trained, folder, chosen, kind)
    return Exported(
        folder,
        "transformers",
        home.architecture or writer.ARCHITECTURE,
        home.why,
        tuple(proofs),
        notes(home, left_out),
    )


def exported_as(home: Home) -> str:
    return home.architecture or writer.ARCHITECTURE


def notes(home: Home, left_out: str) -> tuple[str, ...]:
    """What a user has to know beside the proofs."""
    remote = "" if home.is_stock else "remote code: load it with trust_remote_code=True, after reading its Python files"
    return tuple(filter(None, (remote, left_out)))


def write_files(trained: Trained, folder: Path, dtype: torch.dtype) -> Home:
    """Everything but the proof; where the model lives.

    Raises:
        ValueError: the model is not exported, and why.
    """
    refuse(trained)
    home = find_home(trained.model)
    form: Any = FORMS[home.architecture] if home.is_stock else writer
    write_model(folder, form.config(trained), form.tensors(trained), dtype)
    write_generation_config(trained, folder)
    if not home.is_stock:
        writer.write_code(trained, folder)
    write_processor(trained, folder)
    return home


def refuse(trained: Trained) -> None:
    """Stop where no processor of transformers can do what the model was trained with.

    Raises:
        ValueError: the connector reads the user's words, or pictures and prompts are prepared otherwise.
    """
    if getattr(trained.parts.connector, "instruct", False):
        raise ValueError(
            "a Q-Former with `instruct: true` is not exported: transformers' processors hand a connector no words. "
            "`mllm chat` and `mllm eval` run the stage as it is"
        )
    check_prompt(trained)


def write_processor(trained: Trained, folder: Path) -> None:
    """The processor's files; no weight is looked at."""
    refuse(trained)
    if FORMS.get(find_home(trained.model).architecture) is llava:
        patch, strategy = trained.encoder.grid.patch, llava.select_strategy(trained)
    elif trained.processor.slots.any_resolution:
        patch, strategy = processor_files.patch_of_tokens(trained.processor.slots.any_resolution), "full"
    else:  # the whole picture is one patch; what it becomes is counted as additional tokens
        patch, strategy = trained.processor.pixel_shape[1], "full"
    processor_files.write(trained.processor, folder, trained.parts.llm, patch, strategy, trained.takes_bytes)


def write_model(folder: Path, config: dict[str, Any], tensors: dict[str, Tensor], dtype: torch.dtype) -> None:
    """`config.json`, and the weights in shards of 5 GB with their index."""
    from huggingface_hub import save_torch_state_dict

    folder.mkdir(parents=True, exist_ok=True)
    name = str(dtype).removeprefix("torch.")
    processor_files.write_json(folder / "config.json", {**config, "dtype": name})
    rounded = {key: tensor.detach().to(dtype).contiguous() for key, tensor in tensors.items()}
    save_torch_state_dict(rounded, folder, max_shard_size="5GB")


def write_generation_config(trained: Trained, folder: Path) -> None:
    """Greedy, and where an answer ends, as `mllm chat` has it."""
    own = trained.model.llm.generation_config
    ends = stop_ids(trained.model, trained.processor)
    pad = trained.processor.tokenizer.pad_token_id
    facts = {
        "bos_token_id": own.bos_token_id,
        "eos_token_id": ends[0] if len(ends) == 1 else ends or None,
        "pad_token_id": pad if pad is not None else (ends[0] if ends else None),
        "do_sample": False,
    }
    processor_files.write_json(folder / "generation_config.json", facts)
