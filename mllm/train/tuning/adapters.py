"""Low-rank adapters, by peft: attached to one part, carried on from an earlier stage, merged into the weights below.

Enters: a model and `Lora`. Leaves: the same model with small matrices beside the linear layers of its LLM, or of its
vision encoder; or without them, their sum with the weights in their place.

Each part is wrapped by itself, so that a pattern meant for the LLM cannot reach the encoder or the connector.
"""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from typing import Any

from torch import nn

from mllm.models.deferred import is_deferred, merge_deferred, stand_ins
from mllm.models.multimodal import MultimodalLM
from mllm.models.quantised import dequantise, is_quantised
from mllm.models.vision_encoder import layer_list
from mllm.schema import Fraction, Positive, Schema

ADAPTED = ("llm", "vision_encoder")
"""Parts that can have an adapter."""


@dataclass
class Lora(Schema):
    """Low-rank adapters (LoRA, arXiv 2106.09685) on the linear layers of a part, through peft."""

    rank: Positive = 16
    alpha: Positive = 32
    dropout: Fraction = 0.0
    dora: bool = False
    """Train the length of each weight row beside its direction (DoRA, arXiv 2402.09353)."""
    rslora: bool = False
    """Scale by alpha / sqrt(rank), not alpha / rank: for high ranks (rsLoRA, arXiv 2312.03732)."""
    targets: str | list[str] | None = None
    """Which linear layers: a list of name endings (`[q_proj, v_proj]`) or one regular expression of whole names inside
    the part; without it all but the LLM's head."""


def attach_lora(model: MultimodalLM, lora: Lora, name: str = "llm") -> None:
    """Wrap one part, or let the adapter that an earlier stage gave it go on training.

    Raises:
        ValueError: `targets` name no linear layer; the earlier adapter is of another kind or size.
    """
    from peft import LoraConfig, get_peft_model

    part = wrapped(model, name)
    chosen = target_names(part, lora, name)
    if is_adapted(part):
        check_same(part, lora, chosen)
        set_dropout(part, lora.dropout)
        for parameter_name, parameter in part.named_parameters():
            parameter.requires_grad_("lora_" in parameter_name)
        return
    config = LoraConfig(
        task_type="CAUSAL_LM" if name == "llm" else None,
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        use_dora=lora.dora,
        use_rslora=lora.rslora,
        target_modules=lora.targets or ("all-linear" if name == "llm" else sorted(chosen)),
    )
    with stand_ins(part):
        put(model, name, get_peft_model(part, config))


def merge_lora(model: MultimodalLM) -> None:
    """Put every adapter into the weights below it; 4-bit weights are dequantised first, so that nothing is rounded."""
    for name in ADAPTED:
        merge_adapter(model, name)


def merge_adapter(model: MultimodalLM, name: str) -> None:
    """The same for one part; nothing where it has no adapter."""
    part = wrapped(model, name)
    if not is_adapted(part):
        return
    if is_quantised(part):
        part = on_dequantised(part)
    put(model, name, merge_deferred(part) if is_deferred(part) else part.merge_and_unload())
    getattr(model, name).differs_from_hub = True


def on_dequantised(part: Any) -> Any:
    """The same adapter on the weights that its 4-bit ones stand for: merged into four bits it would be rounded away."""
    from peft import get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict

    config, weights = part.peft_config["default"], get_peft_model_state_dict(part)
    base = part.unload()
    dequantise(base)
    again = get_peft_model(base, config)
    set_peft_model_state_dict(again, weights)
    return again


def wrapped(model: MultimodalLM, name: str) -> Any:
    """What peft wraps, or has wrapped: the LLM, or the vision model inside the encoder."""
    return model.llm if name == "llm" else model.vision_encoder.model


def put(model: MultimodalLM, name: str, part: Any) -> None:
    if name == "llm":
        model.llm = part
    else:
        model.vision_encoder.model = part


def is_adapted(part: Any) -> bool:
    """Has peft wrapped it? Where peft was never imported it cannot have, and importing it costs seconds."""
    peft = sys.modules.get("peft")
    return peft is not None and isinstance(part, peft.PeftModel)


def target_names(part: Any, lora: Lora, name: str) -> set[str]:
    """The linear layers that get an adapter, by their names inside the part.

    Raises:
        ValueError: there is none, or the head is among them.
    """
    linear = linear_layers(part)
    if lora.targets is None:
        inside = tuple(f"{place}." for place in layers_of_encoder(part)) if name == "vision_encoder" else ("",)
        return {found for found in linear - heads(part) if found.startswith(inside)}
    if isinstance(lora.targets, str):
        chosen = {found for found in linear if re.fullmatch(lora.targets, found)}
    else:
        chosen = {found for found in linear if any(f".{found}".endswith(f".{end}") for end in lora.targets)}
    option = "train.lora" if name == "llm" else "train.vision_lora"
    if not chosen:
        kinds = ", ".join(sorted({found.rsplit(".", 1)[-1] for found in linear}))
        raise ValueError(
            f"{option}.targets {lora.targets!r} names no linear layer of the {name}: its layers end in {kinds}; a list "
            f"holds such endings, a string is a regular expression of a whole name like {min(linear)!r}"
        )
    if touched := chosen & heads(part):
        raise ValueError(f"{option}.targets {lora.targets!r} names {min(touched)}, the head: it has no adapter here")
    return chosen


def linear_layers(part: Any) -> set[str]:
    """Names of all linear layers, also where peft has put its own in their place."""
    from transformers.pytorch_utils import Conv1D

    base = part.get_base_model() if is_adapted(part) else part
    adapted = adapter_layers(base)
    plain = {name for name, module in base.named_modules() if isinstance(module, nn.Linear | Conv1D)}
    return adapted | {name for name in plain if not any(name.startswith(f"{place}.") for place in adapted)}


def adapter_layers(base: nn.Module) -> set[str]:
    return {name for name, module in base.named_modules() if hasattr(module, "lora_A")}


def heads(part: Any) -> set[str]:
    """The name of the LLM's head; nothing for an encoder."""
    base = part.get_base_model() if is_adapted(part) else part
    head = base.get_output_embeddings() if hasattr(base, "get_output_embeddings") else None
    return {name for name, module in base.named_modules() if head is not None and module is head}


def layers_of_encoder(part: Any) -> set[str]:
    """Where the layers in front of the tap lie: what is behind them (a pooler) would never get a gradient."""
    base = part.get_base_model() if is_adapted(part) else part
    several = [encoder.model for encoder in base] if isinstance(base, nn.ModuleList) else [base]
    layers = [encoder_layers(encoder) for encoder in several]
    return {name for name, module in base.named_modules() if any(module is found for found in layers)}


def encoder_layers(base: Any) -> nn.ModuleList:
    """The encoder's list of layers, also when those behind the tap were cut off."""
    try:
        return layer_list(base)
    except ValueError:
        return max((m for m in base.modules() if isinstance(m, nn.ModuleList)), key=len)


def check_same(part: Any, lora: Lora, chosen: set[str]) -> None:
    """An adapter goes on as what it is.

    Raises:
        ValueError: rank, alpha, kind or places differ; tells both.
    """
    own = part.peft_config["default"]
    found = describe(own.r, own.lora_alpha, own.use_dora, own.use_rslora)
    asked = describe(lora.rank, lora.alpha, lora.dora, lora.rslora)
    if found != asked:
        raise ValueError(
            f"the earlier stage's adapter has {found}, train.lora says {asked}: an adapter cannot change its size or "
            f"kind; give the same, or train the part whole, which merges it first"
        )
    if (places := adapter_layers(part.get_base_model())) != chosen:
        differing = sorted(places ^ chosen)
        raise ValueError(
            f"the earlier stage's adapter sits in {len(places)} layers, train.lora.targets names {len(chosen)}: they "
            f"differ in {', '.join(differing[:3])}; give the targets of the earlier stage"
        )


def describe(rank: int, alpha: float, dora: bool, rslora: bool) -> str:
    kinds = [name for name, on in (("DoRA", dora), ("rsLoRA", rslora)) if on]
    return " and ".join([f"rank {rank}", f"alpha {alpha:g}", *kinds])


def set_dropout(part: Any, share: float) -> None:
    """Dropout has no weights: it is this stage's own."""
    part.peft_config["default"].lora_dropout = share
    for module in part.modules():
        if hasattr(module, "lora_dropout"):
            module.lora_dropout["default"] = nn.Dropout(share) if share else nn.Identity()
