"""What a stage takes over from an earlier one: all that it trained, or the parts that are named.

Enters: a run's config with `init_from`, and its model. Leaves: the model with the earlier stage's weights, and a
sentence that says which, and how the parts differ from those they were trained with. Nothing is drawn anew unless
`init_parts` leaves it out; what does not fit is named and refused.
"""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

from mllm.config import RunConfig, stage_run
from mllm.models.build import ModelConfig
from mllm.models.multimodal import MultimodalLM
from mllm.train.blip2.text_side import FILE as TEXT_SIDE
from mllm.train.stage_folder import TAKEN, holds, load_stage

NEWLINE = "image_newline"
OF_ANY_RUN = ("dtype", "attention", "random_weights")
"""Fields of the model section that change how a model is computed and not what its weights mean."""


def take_over(config: RunConfig, model: MultimodalLM) -> str:
    """Read the earlier stage into the model; what was read, in words.

    Raises:
        ValueError: weights that were trained in another LLM or encoder would be put into this one unasked, a part is
            asked for that the stage did not train, or a tensor does not fit.
    """
    assert config.init_from
    before, now = stage_run(config.init_from).parts(), config.parts()
    parts = check_parts(config, before, now)
    fresh = fresh_parts(config, model, parts)
    try:
        load_stage(model, config.init_from, parts)
    except ValueError as error:
        if "does not fit" not in str(error):
            raise
        raise ValueError(f"{error}\n  {advice(config, before, now)}") from error
    told = [f"{name}: {old} there, {new} here" for name, old, new in differences(before, now)]
    if model.image_newline is None and NEWLINE in parts:
        parts.remove(NEWLINE)
        told.append(f"{NEWLINE}: left behind, without data.tiles anyres nobody reads it")
    if (config.init_from / TEXT_SIDE).is_file():
        told.append(f"{TEXT_SIDE}: left behind, the text side and the heads of the Q-Former's own stage")
    return "\n  ".join(
        [
            f"starting from {config.init_from} with its {', '.join(parts)}",
            *([f"started anew: {', '.join(fresh)}"] if fresh else []),
            *told,
        ]
    )


def fresh_parts(config: RunConfig, model: MultimodalLM, parts: list[str]) -> list[str]:
    """What starts anew: the connector or what the stage trained, if it is left out of `init_parts`; a newline that the
    stage did not have.

    Raises:
        ValueError: such a newline would stay as it was drawn.
    """
    assert config.init_from
    has = [name for name in TAKEN if name == "connector" or holds(config.init_from, name)]
    if model.image_newline is not None and NEWLINE not in parts:
        if not config.train.learning_rate.image_newline:
            raise ValueError(
                f"{config.init_from} has no {NEWLINE} to take over for data.tiles anyres, and a new one would stay as "
                f"it was drawn: give train.learning_rate.connector a rate, which is the newline's too"
            )
        has.append(NEWLINE)
    return [name for name in TAKEN if name in has and name not in parts]


def check_parts(config: RunConfig, before: ModelConfig, now: ModelConfig) -> list[str]:
    """The trained parts that are taken over."""
    assert config.init_from
    trained = [name for name in TAKEN if holds(config.init_from, name)]
    if config.init_parts is not None:
        if missing := [name for name in config.init_parts if name not in trained]:
            raise ValueError(
                f"init_parts names {', '.join(missing)}, but {config.init_from} trained {', '.join(trained)} only"
            )
        return [name for name in trained if name in config.init_parts]
    for name in ("llm", "vision_encoder"):
        old, new = getattr(before, name), getattr(now, name)
        if name in trained and not same_place(old, new):
            rest = " ".join(part for part in trained if part != name)
            raise ValueError(
                f"{config.init_from} trained the {name} {old}, this run has {new}: what was learned in the one means "
                f"nothing in the other. --init_parts {rest} takes over the rest; naming {name} there too insists"
            )
    return trained


def differences(before: ModelConfig, now: ModelConfig) -> list[tuple[str, Any, Any]]:
    """Fields of the model section that were set otherwise when the weights were trained."""
    pairs = [(field.name, getattr(before, field.name), getattr(now, field.name)) for field in fields(now)]
    return [(name, old, new) for name, old, new in pairs if name not in OF_ANY_RUN and not same_place(old, new)]


def same_place(one: Any, other: Any) -> bool:
    """The same value; of folders, also by another path."""
    if isinstance(one, str) and isinstance(other, str) and Path(one).exists() and Path(other).exists():
        return Path(one).resolve() == Path(other).resolve()
    return bool(one == other)


def advice(config: RunConfig, before: ModelConfig, now: ModelConfig) -> str:
    """What to do about weights that do not fit."""
    changed = [name for name, _, _ in differences(before, now)]
    because = f"{', '.join(changed)} changed since {config.init_from}. " if changed else ""
    return f"{because}Nothing is drawn anew unasked: leave a part out of --init_parts, and it starts anew"
