"""Names and configs that old and new transformers read alike.

Enters: the parts as transformers 5 has them in memory. Leaves: tensors under the names that published checkpoints use
(transformers 4.57 knows no others; 5.x renames them when it loads), and config dictionaries with the fields of both.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


def published_names(model: Any) -> dict[str, Tensor]:
    """The state dict of a transformers model under the names of its published checkpoints.

    transformers knows the renaming (it applies it at load), and undoes it only for models that it loaded itself.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import revert_weight_conversion

    model._weight_conversions = get_model_conversion_mapping(model, add_legacy=False)
    return dict(revert_weight_conversion(model, model.state_dict()))


def decoder_of(llm: Any) -> Any:
    """The LLM without its head: the class that `AutoModel` makes of its config."""
    return getattr(llm, llm.base_model_prefix)


def text_config(llm: Any, rows: int) -> dict[str, Any]:
    """The LLM's config: `architectures` set (llama.cpp takes it for a Llama otherwise), `rows` token embeddings."""
    config = {**readable(llm.config), "architectures": [type(llm).__name__], "vocab_size": rows}
    config["tie_word_embeddings"] = is_tied(llm)
    return config


def vision_config(model: Any) -> dict[str, Any]:
    """The encoder's config; SigLIP's pooling head is said to be absent (transformers builds it by default)."""
    config = readable(model.config)
    if hasattr(model.config, "vision_use_head") or model.config.model_type.startswith("siglip"):
        config["vision_use_head"] = False
    return config


def readable(config: Any) -> dict[str, Any]:
    """A config of transformers 5 that 4.57 reads too: rotary settings under their old names as well."""
    written = config.to_dict()
    for name in ("_name_or_path", "transformers_version", "dtype", "architectures"):
        written.pop(name, None)
    rope = written.get("rope_parameters") or {}
    if "full_attention" in rope:  # Gemma 3: one set for each kind of layer
        written["rope_local_base_freq"] = rope.get("sliding_attention", {}).get("rope_theta")
        rope = rope["full_attention"]
    if "rope_theta" in rope:
        written["rope_theta"] = written["rotary_emb_base"] = rope["rope_theta"]
        scaling = {k: v for k, v in rope.items() if k not in ("rope_theta", "partial_rotary_factor")}
        written["rope_scaling"] = scaling if rope.get("rope_type", "default") != "default" else None
    if "partial_rotary_factor" in rope:
        written["partial_rotary_factor"] = written["rotary_pct"] = rope["partial_rotary_factor"]
    return written


def is_tied(llm: Any) -> bool:
    """Do input and output embeddings share one matrix?"""
    head: nn.Module = llm.get_output_embeddings()
    return head.weight is llm.get_input_embeddings().weight
