"""What trains, and how fast: all of it read from one table of learning rates.

Enters: a frozen model and the table. Leaves: the same model with `requires_grad` on exactly where the table has a
rate (set before anything wraps the model), and the optimiser's parameter groups.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import nn

from mllm.models.multimodal import MultimodalLM
from mllm.schema import Fraction, NotNegative, Positive, Schema


@dataclass
class LearningRates(Schema):
    """Peak learning rate of each part. A part without a rate is frozen."""

    connector: NotNegative | None = None
    llm: NotNegative | None = None
    """Of the whole LLM, or of its LoRA adapter where `lora` is set."""
    vision_encoder: NotNegative | None = None


@dataclass
class Lora(Schema):
    """Low-rank adapters on every linear layer of the LLM except its head (peft)."""

    rank: Positive = 16
    alpha: Positive = 32
    dropout: Fraction = 0.0


@dataclass
class Part:
    """One line of the table that every run prints."""

    name: str
    trained: int
    frozen: int
    rate: float | None


def choose_trainable(model: MultimodalLM, rates: LearningRates, lora: Lora | None) -> None:
    """Switch on what the table names; everything else stays frozen.

    Trained weights become float32 (bfloat16 cannot hold the small steps of an optimiser).
    """
    if lora and rates.llm is None:
        raise ValueError("train.lora without train.learning_rate.llm: an adapter without a rate would not train")
    if not any(getattr(rates, part.name) for part in fields(rates)):
        raise ValueError("nothing trains: give train.learning_rate.connector, .llm or .vision_encoder a rate")
    model.requires_grad_(False)
    if lora:
        attach_lora(model, lora)
    elif rates.llm is not None:
        merge_lora(model)
        model.llm.requires_grad_(True)
    if rates.connector is not None:
        model.connector.requires_grad_(True)
    if rates.vision_encoder is not None:
        model.vision_encoder.requires_grad_(True)
        model.vision_encoder.freeze_behind_tap()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def attach_lora(model: MultimodalLM, lora: Lora) -> None:
    """Wrap the LLM, and only the LLM: `all-linear` on the whole model would leak into encoder and connector."""
    from peft import LoraConfig, PeftModel, get_peft_model

    if isinstance(model.llm, PeftModel):  # an earlier stage's adapter goes on training
        own: Any = model.llm.peft_config["default"]
        if (own.r, own.lora_alpha) != (lora.rank, lora.alpha):
            raise ValueError(
                f"the earlier stage's adapter has rank {own.r} and alpha {own.lora_alpha}, train.lora says "
                f"rank {lora.rank} and alpha {lora.alpha}: an adapter cannot change its size"
            )
        for name, parameter in model.llm.named_parameters():
            parameter.requires_grad_("lora_" in name)
        return
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules="all-linear",
    )
    model.llm = get_peft_model(model.llm, config)  # type: ignore[arg-type]


def merge_lora(model: MultimodalLM) -> None:
    """Put an earlier stage's adapter into the weights below it, before these train themselves."""
    from peft import PeftModel

    if isinstance(model.llm, PeftModel):
        model.llm = model.llm.merge_and_unload()
        model.llm.differs_from_hub = True


def parameter_groups(model: MultimodalLM, rates: LearningRates, weight_decay: float) -> list[dict[str, Any]]:
    """AdamW's groups: per part one with decay (matrices) and one without (biases, norms); `peak` is the part's rate."""
    groups = []
    for name in (field.name for field in fields(rates)):
        trained = [p for p in getattr(model, name).parameters() if p.requires_grad]
        for decay, members in (
            (weight_decay, [p for p in trained if p.ndim >= 2]),
            (0.0, [p for p in trained if p.ndim < 2]),
        ):
            if members:
                rate = getattr(rates, name)
                groups.append({"params": members, "lr": rate, "peak": rate, "weight_decay": decay, "part": name})
    return groups


def set_mode(model: MultimodalLM) -> None:
    """Training mode for what trains; a frozen part behaves as it will in use (no dropout)."""
    for part in (model.vision_encoder, model.connector, model.llm):
        part.train(any(parameter.requires_grad for parameter in part.parameters()))
    for layer in model.llm.modules():
        if getattr(layer, "gradient_checkpointing", False):
            layer.training = True  # transformers recomputes in training mode only; what lies inside the layer stays


def parts(model: MultimodalLM, rates: LearningRates) -> list[Part]:
    """The table: per part how many parameters train, how many are frozen, at which rate."""
    return [
        Part(name, count(getattr(model, name), True), count(getattr(model, name), False), getattr(rates, name))
        for name in ("vision_encoder", "connector", "llm")
    ]


def count(module: nn.Module, trained: bool) -> int:
    return sum(p.numel() for p in module.parameters() if p.requires_grad is trained)


def trained_weights(model: MultimodalLM) -> dict[str, torch.Tensor]:
    """Every parameter that trains, by its full name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
