"""What a run will be exported as, said before it trains: afterwards it is too late to choose otherwise.

Enters: the config of a run and its model, with or without weights. Leaves: the transformers class, or why none holds
the model; then also the settings that come nearest to the chosen ones and have a class. They are found by trying: what
`mllm export` would decide about each is asked of the room that decides.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from itertools import product
from typing import TYPE_CHECKING, Any

import torch

from mllm.config import RunConfig
from mllm.export.homes import Home, find_home
from mllm.export.trained import prompt_obstacle
from mllm.models.build import ModelConfig
from mllm.models.multimodal import MultimodalLM
from mllm.train.watching.console import console

if TYPE_CHECKING:
    from accelerate import Accelerator

REMOTE, NOTHING = "remote code", "nothing"
CHOICES: dict[str, dict[str, list[Any]]] = {
    "mlp": {"norm": [False, True], "depth": [2]},
    "pixel_shuffle": {"norm": [True, False], "activation": ["swiglu", "gelu"], "depth": [2, 1]},
    "avg_pool": {"depth": [1]},
}
"""Settings of a connector that decide about its class and leave it what it is; the first that does comes first."""


@dataclass(frozen=True)
class Prospect:
    """Where a trained model will live."""

    exports_as: str
    """The transformers class, `remote code`, or `nothing` where nobody else prepares pictures or prompts so."""
    why: str
    instead: str = ""
    """Settings that would make it a stock class, and which; empty where it is one, or none would."""

    def __str__(self) -> str:
        ways = f"; {self.instead}" if self.instead else ""
        return f"exports as {self.exports_as}: {self.why}{ways}"


def tell(accelerator: Accelerator, config: RunConfig, model: MultimodalLM) -> None:
    """One line on the screen of rank 0."""
    console(accelerator).print(str(prospect(config, model)), highlight=False, soft_wrap=True)


def prospect(config: RunConfig, model: MultimodalLM) -> Prospect:
    """Ask the room that decides at export."""
    parts, merged = config.parts(), without_adapters(model)
    if getattr(parts.connector, "instruct", False):
        return Prospect(NOTHING, "connector.instruct: true hands the connector words, which no processor there does")
    if why := prompt_obstacle(config.data):
        return Prospect(NOTHING, why)
    home = find_home(merged)
    if home.is_stock:
        return Prospect(home.architecture, home.why)
    return Prospect(REMOTE, home.why, "" if config.init_from else way_to_a_class(parts, merged))


def without_adapters(model: MultimodalLM) -> MultimodalLM:
    """Export merges them; here they only stand in the way."""
    llm = model.llm.get_base_model() if hasattr(model.llm, "peft_config") else model.llm
    return MultimodalLM(model.vision_encoder, model.connector, llm, model.image_token_id, model.image_newline)


def way_to_a_class(parts: ModelConfig, model: MultimodalLM) -> str:
    """The fewest changes to tap and connector after which a stock class holds the model."""
    for changes in sorted(neighbours(parts), key=len):
        home = home_after(parts, model, changes)
        if home and home.is_stock:
            told = ", ".join(f"{name}: {str(value).lower()}" for name, value in changes.items())
            return f"{told} would make it {home.architecture}"
    return ""


def neighbours(parts: ModelConfig) -> Iterator[dict[str, Any]]:
    """Every other combination of the choices, as the settings that differ."""
    own = {f"model.connector.{name}": value for name, value in asdict(parts.connector).items()}
    own["model.feature_norm"] = parts.feature_norm
    choices = {f"model.connector.{name}": values for name, values in CHOICES.get(parts.connector.type, {}).items()}
    choices["model.feature_norm"] = [False, True]
    for values in product(*choices.values()):
        changes = {name: value for name, value in zip(choices, values, strict=True) if own[name] != value}
        if changes:
            yield changes


def home_after(parts: ModelConfig, model: MultimodalLM, changes: dict[str, Any]) -> Home | None:
    """Where the model would live; nothing where the settings do not go together."""
    encoder = copy.copy(model.vision_encoder)
    encoder.feature_norm = changes.get("model.feature_norm", parts.feature_norm)
    of_connector = {
        name.removeprefix("model.connector."): value for name, value in changes.items() if "connector" in name
    }
    width = model.llm.get_input_embeddings().embedding_dim
    try:
        with torch.device("meta"):
            connector = replace(parts.connector, **of_connector).build(encoder.width, width, encoder.num_patches)
    except ValueError:
        return None
    return find_home(MultimodalLM(encoder, connector, model.llm, model.image_token_id, model.image_newline))
