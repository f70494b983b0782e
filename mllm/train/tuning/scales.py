"""Factors on the learning rate of a part: by the name of a parameter, by the depth of its layer.

Enters: a model, patterns, decays. Leaves: one factor for each parameter that trains. Names are those of the parts
without an adapter's wrapping: `llm.model.layers.0.mlp.up_proj.weight`, `...up_proj.lora_B.default.weight`.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from typing import Annotated, Any, Literal

from pydantic import Field
from torch import nn

PartName = Literal["connector", "image_newline", "llm", "vision_encoder"]
Decay = Annotated[float, Field(gt=0, le=1)]


def check_patterns(patterns: Iterable[str]) -> None:
    """Raises a `ValueError` for what is no regular expression."""
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"pattern {pattern!r} is no regular expression: {error}") from error


def check_used(patterns: Iterable[str], model: nn.Module) -> None:
    """Every pattern must be found in the name of something that trains.

    Raises:
        ValueError: one is not; names what comes near, or that it is frozen.
    """
    trained = [plain(name) for name, p in model.named_parameters() if p.requires_grad]
    for pattern in patterns:
        if any(re.search(pattern, name) for name in trained):
            continue
        told = f"train.learning_rate.patterns: {pattern!r} is found in no parameter that trains"
        frozen = [name for name in (plain(n) for n, _ in model.named_parameters()) if re.search(pattern, name)]
        if frozen:
            raise ValueError(
                f"{told}, only in frozen ones ({frozen[0]}): give the part a rate (with an adapter, only lora_A and "
                f"lora_B train), or leave the pattern out"
            )
        raise ValueError(f"{told}; near ones: {', '.join(near(pattern, trained))}")


def near(pattern: str, names: list[str]) -> list[str]:
    """The three names whose words are most like the pattern's, one layer speaking for all."""
    words = re.findall(r"[a-z_]{2,}", pattern.lower()) or [pattern]
    kinds = list({re.sub(r"\d+", "", name): name for name in reversed(names)}.values())

    def likeness(name: str) -> float:
        own = name.lower().split(".")
        return sum(max(difflib.SequenceMatcher(None, word, part).ratio() for part in own) for word in words)

    return sorted(kinds, key=lambda name: (-likeness(name), name))[:3]


def factors(
    model: Any, parts: Iterable[PartName], patterns: dict[str, float], layer_decay: dict[PartName, float]
) -> dict[str, float]:
    """The product of all that applies, for every parameter that trains; 1 where nothing does."""
    found = {}
    for part in parts:
        module: nn.Module = getattr(model, part)
        powers = steps_below_the_last(module, part) if part in layer_decay else {}
        for name, parameter in module.named_parameters():
            if parameter.requires_grad:
                factor = layer_decay[part] ** powers[name] if powers else 1.0
                for pattern, scale in patterns.items():
                    factor *= scale if re.search(pattern, plain(f"{part}.{name}")) else 1.0
                found[f"{part}.{name}"] = factor
    return found


def steps_below_the_last(module: nn.Module, part: str) -> dict[str, int]:
    """How many layers each parameter lies below the last one: 0 in it and behind it, the number of layers in front of
    the first (embeddings).

    Raises:
        ValueError: the part has no list of layers, or several.
    """
    if len(getattr(module, "encoders", ())) > 1:
        raise ValueError(
            f"train.learning_rate.layer_decay.{part} has no meaning for several encoders side by side: "
            f"give their layers factors by train.learning_rate.patterns"
        )
    lists = {name: found for name, found in module.named_modules() if isinstance(found, nn.ModuleList)}
    if not lists:
        raise ValueError(f"train.learning_rate.layer_decay.{part}: this {part} has no list of layers")
    place, layers = max(lists.items(), key=lambda item: sum(p.numel() for p in item[1].parameters()))
    below, powers = len(layers), {}
    for name, _ in module.named_parameters():
        if name.startswith(f"{place}."):
            below = 0
            powers[name] = len(layers) - 1 - int(name[len(place) + 1 :].split(".")[0])
        else:
            powers[name] = below
    return powers


def plain(name: str) -> str:
    """A parameter's name without what peft puts into it."""
    return name.replace("base_model.model.", "").replace(".base_layer.", ".")
