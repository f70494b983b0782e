"""What trains, and how fast: all of it read from one table of learning rates.

Enters: a frozen model and the table. Leaves: the same model with `requires_grad` on exactly where the table has a
rate (set before anything wraps the model), and the optimiser's parameter groups.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from mllm.models.multimodal import MultimodalLM
from mllm.models.quantised import is_quantised, numel
from mllm.schema import Rate, Schema
from mllm.train.tuning.adapters import Lora, attach_lora, merge_adapter
from mllm.train.tuning.scales import Decay, PartName, check_patterns, check_used, factors, plain

PARTS: tuple[PartName, ...] = ("connector", "image_newline", "llm", "vision_encoder")
"""In the order of the optimiser's groups; `parts_of` says which a model has."""


@dataclass
class LearningRates(Schema):
    """Peak learning rate of each part. A part without a rate, or with 0, is frozen."""

    connector: Rate | None = None
    llm: Rate | None = None
    """Of the whole LLM, or of its adapter where `lora` is set."""
    vision_encoder: Rate | None = None
    """Of the whole encoder, or of its adapter where `vision_lora` is set."""
    patterns: dict[str, Rate] = field(default_factory=dict)
    """Factors on the part's rate where a regular expression is found in a parameter's name: `{"llm.*embed_tokens":
    0.1}`; 0 freezes, several multiply."""
    layer_decay: dict[PartName, Decay] = field(default_factory=dict)
    """Factor from each layer of a part to the one below it: `{vision_encoder: 0.9}`; embeddings lie below the
    first."""

    def __post_init__(self) -> None:
        check_patterns(self.patterns)

    @property
    def image_newline(self) -> float | None:
        """Of the vector that ends the rows of tiles: the connector's, whose output it stands among."""
        return self.connector


@dataclass
class Part:
    """One line of the table that every run prints."""

    name: str
    trained: int
    frozen: int
    rate: float | None


def parts_of(model: MultimodalLM) -> list[PartName]:
    """The parts that the model has: a newline only where tiles are laid out at any resolution."""
    return [name for name in PARTS if getattr(model, name) is not None]


def choose_trainable(
    model: MultimodalLM, rates: LearningRates, lora: Lora | None, vision_lora: Lora | None = None
) -> None:
    """Switch on what the table names; everything else stays frozen.

    Trained weights become float32 (bfloat16 cannot hold the small steps of an optimiser).

    Raises:
        ValueError: the table says something that cannot be meant.
    """
    adapters = {"llm": lora, "vision_encoder": vision_lora}
    check_table(model, rates, adapters)
    model.requires_grad_(False)
    for name, adapter in adapters.items():
        if adapter:
            attach_lora(model, adapter, name)
        elif getattr(rates, name):
            merge_adapter(model, name)
            getattr(model, name).requires_grad_(True)
    if rates.connector:
        for part in (model.connector, model.image_newline):
            if part is not None:
                part.requires_grad_(True)
    if rates.vision_encoder:
        model.vision_encoder.freeze_behind_tap()
    freeze_scaled_to_zero(model, rates)
    for name in parts_of(model):
        is_whole = bool(getattr(rates, name)) and not adapters.get(name)
        for parameter in getattr(model, name).parameters():
            if parameter.requires_grad or is_whole:  # a part that is half bfloat16 could not compute
                parameter.data = parameter.data.float()


def check_table(model: MultimodalLM, rates: LearningRates, adapters: dict[str, Lora | None]) -> None:
    """Stop where the table and the adapters contradict each other."""
    for name, adapter in adapters.items():
        if adapter and not getattr(rates, name):
            option = "lora" if name == "llm" else "vision_lora"
            raise ValueError(
                f"train.{option} without train.learning_rate.{name}: an adapter without a rate would not train"
            )
    if not any(getattr(rates, name) for name in PARTS):
        raise ValueError("nothing trains: give train.learning_rate.connector, .llm or .vision_encoder a rate")
    if rates.llm and not adapters["llm"] and is_quantised(model.llm):
        raise ValueError(
            "train.learning_rate.llm would train the whole LLM, and model.quantisation holds it in four bits, which "
            "cannot take an optimiser's small steps: add train.lora (QLoRA), or set model.quantisation to null"
        )
    for name in rates.layer_decay:
        if not getattr(rates, name):
            raise ValueError(f"train.learning_rate.layer_decay.{name} without train.learning_rate.{name}: it is frozen")


def freeze_scaled_to_zero(model: MultimodalLM, rates: LearningRates) -> None:
    """What a pattern multiplies by 0 does not train.

    Raises:
        ValueError: a pattern names nothing that trains, or nothing is left.
    """
    check_used(rates.patterns, model)
    trained = trained_weights(model)
    for name, factor in rate_factors(model, rates).items():
        if not factor:
            trained[name].requires_grad_(False)
    if not trained_weights(model):
        raise ValueError("nothing trains: train.learning_rate.patterns multiplies every rate by 0")


def rate_factors(model: MultimodalLM, rates: LearningRates) -> dict[str, float]:
    """The factor on its part's rate of everything that trains, by name."""
    return factors(model, parts_of(model), rates.patterns, rates.layer_decay)


def parameter_groups(model: MultimodalLM, rates: LearningRates, weight_decay: float) -> list[dict[str, Any]]:
    """AdamW's groups: per part and factor one with decay (matrices) and one without (biases, norms).

    `peak` is the group's rate, `scale` its factor on the part's own.
    """
    factor = rate_factors(model, rates)
    groups = []
    for part in parts_of(model):
        trained = [
            (p, factor[f"{part}.{name}"]) for name, p in getattr(model, part).named_parameters() if p.requires_grad
        ]
        for decay, members in (
            (weight_decay, [(p, scale) for p, scale in trained if p.ndim >= 2]),
            (0.0, [(p, scale) for p, scale in trained if p.ndim < 2]),
        ):
            for scale in dict.fromkeys(scale for _, scale in members):
                rate = getattr(rates, part) * scale
                own = [p for p, found in members if found == scale]
                shared = {"lr": rate, "peak": rate, "weight_decay": decay, "part": part, "scale": scale}
                groups.append({"params": own, **shared})
    return groups


def set_mode(model: MultimodalLM) -> None:
    """Training mode for what trains; a frozen part behaves as it will in use (no dropout)."""
    for part in (model.vision_encoder, model.connector, model.llm):
        part.train(any(parameter.requires_grad for parameter in part.parameters()))
    for layer in model.modules():
        if getattr(layer, "gradient_checkpointing", False):
            layer.training = True  # transformers recomputes in training mode only; what lies inside the layer stays


def parts(model: MultimodalLM, rates: LearningRates) -> list[Part]:
    """The table: per part how many parameters train, how many are frozen, at which rate."""
    return [
        Part(name, count(getattr(model, name), True), count(getattr(model, name), False), getattr(rates, name))
        for name in ("vision_encoder", "connector", "image_newline", "llm")
        if name in parts_of(model)
    ]


def refinements(model: MultimodalLM, rates: LearningRates, part: str) -> list[tuple[str, int, str]]:
    """What refines one part's rate: (words, parameters that it touches, the rates that they have in the end)."""
    factor = {name: f for name, f in rate_factors(model, rates).items() if name.startswith(f"{part}.")}
    rules = {f"  × {scale:g}  {p}": p for p, scale in rates.patterns.items()}
    touched = {words: [n for n in factor if re.search(rule, plain(n))] for words, rule in rules.items()}
    if part in rates.layer_decay:
        touched[f"  × {rates.layer_decay[part]:g} a layer down"] = list(factor)  # type: ignore[index]
    trained = trained_weights(model)
    return [
        (words, sum(numel(trained[n]) for n in names), told([getattr(rates, part) * factor[n] for n in names]))
        for words, names in touched.items()
        if names
    ]


def told(rates: list[float]) -> str:
    low, high = min(rates), max(rates)
    return f"{high:g}" if low == high else f"{low:.3g} – {high:.3g}"


def count(module: nn.Module, trained: bool) -> int:
    return sum(numel(p) for p in module.parameters() if p.requires_grad is trained)


def trained_weights(model: MultimodalLM) -> dict[str, torch.Tensor]:
    """Every parameter that trains, by its full name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
