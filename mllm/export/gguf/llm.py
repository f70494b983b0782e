"""The LLM half: settings and tensors of a Llama, Mistral, Qwen2 or Qwen3 as llama.cpp names them.

Enters: a `Trained`. Leaves: a `File` with architecture, sizes, rotary settings, vocabulary and weights.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from mllm.export.gguf.file import File
from mllm.export.gguf.vocabulary import vocabulary, vocabulary_obstacles
from mllm.export.layout import is_tied
from mllm.export.trained import Trained

ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
"""transformers' model type -> llama.cpp's architecture."""
ROPE = ("default", "linear", "llama3")


def obstacles(llm: Any) -> list[str]:
    """Why this LLM cannot be written; nothing if it can. Asked of a skeleton too."""
    config = llm.config
    if config.model_type not in ARCHITECTURES:
        return [f"{config.model_type} LLMs are not written as GGUF here (known: {', '.join(ARCHITECTURES)})"]
    found = []
    if (kind := rope(config)["rope_type"]) not in ROPE:
        found.append(f"rotary scaling {kind!r} (known: {', '.join(ROPE)})")
    if getattr(config, "sliding_window", None) and "sliding_attention" in (getattr(config, "layer_types", None) or []):
        found.append("sliding windows are not written")
    if config.model_type == "llama" and (
        getattr(config, "mlp_bias", False) or getattr(config, "attention_bias", False)
    ):
        found.append("an LLM with attention_bias or mlp_bias")
    return found


def describe(trained: Trained) -> File:
    """Everything that goes into the file.

    Raises:
        ValueError: llama.cpp has no such tokenizer.
    """
    config = trained.llm_config
    if found := vocabulary_obstacles(trained.processor.tokenizer):
        raise ValueError("no GGUF of this model: " + "; ".join(found))
    rows = trained.model.llm.get_input_embeddings().num_embeddings
    settings = [*sizes(config, rows), *rotary(config), *vocabulary(trained, rows)]
    return File(ARCHITECTURES[config.model_type], settings, tensors(trained.model.llm))


def sizes(config: Any, rows: int) -> list[tuple[Any, ...]]:
    heads = config.num_attention_heads
    width = head_width(config)
    return [
        ("add_type", "model"),
        ("add_context_length", config.max_position_embeddings),
        ("add_embedding_length", config.hidden_size),
        ("add_block_count", config.num_hidden_layers),
        ("add_feed_forward_length", config.intermediate_size),
        ("add_head_count", heads),
        ("add_head_count_kv", getattr(config, "num_key_value_heads", None) or heads),
        ("add_key_length", width),
        ("add_value_length", width),
        ("add_layer_norm_rms_eps", config.rms_norm_eps),
        ("add_vocab_size", rows),
    ]


def head_width(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def rope(config: Any) -> dict[str, Any]:
    """transformers 5's rotary settings."""
    return {"rope_type": "default", "rope_theta": 10000.0, **(getattr(config, "rope_parameters", None) or {})}


def rotary(config: Any) -> list[tuple[Any, ...]]:
    found = rope(config)
    settings: list[tuple[Any, ...]] = [
        ("add_rope_freq_base", float(found["rope_theta"])),
        ("add_rope_dimension_count", head_width(config)),
    ]
    if found["rope_type"] == "linear":
        import gguf

        settings += [("add_rope_scaling_type", gguf.RopeScalingType.LINEAR)]
        settings += [("add_rope_scaling_factor", float(found["factor"]))]
    return settings


def tensors(llm: Any) -> dict[str, Tensor]:
    """Every weight under GGUF's name; Llama's queries and keys in the order of llama.cpp's rotation."""
    import gguf

    config = llm.config
    kind = ARCHITECTURES[config.model_type]
    (arch,) = (arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == kind)
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    heads = config.num_attention_heads
    heads_of = {"q_proj": heads, "k_proj": getattr(config, "num_key_value_heads", None) or heads}
    found: dict[str, Tensor] = {}
    for name, parameter in llm.named_parameters():
        if name == "lm_head.weight" and is_tied(llm):
            continue
        renamed = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert renamed is not None, f"gguf has no name for {name}"
        layer = name.split(".")[-2]
        turned = kind == "llama" and layer in heads_of
        found[renamed] = interleaved(parameter.detach(), heads_of[layer]) if turned else parameter.detach()
    if rope(config)["rope_type"] == "llama3":
        found["rope_freqs.weight"] = llama3_factors(config)
    return found


def interleaved(weight: Tensor, heads: int) -> Tensor:
    """transformers rotates the two halves of a head against each other, llama.cpp (for Llama) neighbours."""
    halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return halves.swapaxes(1, 2).reshape(weight.shape)


def llama3_factors(config: Any) -> Tensor:
    """Llama 3.1's scaling as one divisor for each frequency: none for short waves, `factor` for long ones, and a slope
    between them (transformers `modeling_rope_utils.py`, `_compute_llama3_parameters`)."""
    found = rope(config)
    width, old = head_width(config), found["original_max_position_embeddings"]
    waves = 2 * math.pi * found["rope_theta"] ** (torch.arange(0, width, 2, dtype=torch.float32) / width)
    low, high = found["low_freq_factor"], found["high_freq_factor"]
    smooth = (old / waves - low) / (high - low)
    between = 1 / ((1 - smooth) / found["factor"] + smooth)
    factors = torch.where(waves > old / low, torch.full_like(waves, found["factor"]), between)
    return torch.where(waves < old / high, torch.ones_like(waves), factors)
