"""Gradient checkpointing: parts whose layers are computed again in the backward pass, so that less is kept till then.

Enters: a model whose trainable parts are chosen, and the parts to checkpoint. Leaves: the same model, the same losses
and gradients, less memory, up to a third slower in that part. Nothing is kept for a part that is frozen with nothing
trained below it, so that there it saves nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Annotated, Any, Literal, get_args

from pydantic import Field
from torch import nn
from torch.utils.checkpoint import checkpoint

from mllm.models.multimodal import MultimodalLM

CheckpointedPart = Literal["llm", "connector", "vision_encoder"]
Checkpointing = bool | Annotated[list[CheckpointedPart], Field(min_length=1)]
"""`true` means the LLM alone."""


def checkpointed(choice: Checkpointing) -> tuple[CheckpointedPart, ...]:
    """The parts that a setting names."""
    if isinstance(choice, bool):
        return ("llm",) if choice else ()
    return tuple(part for part in get_args(CheckpointedPart) if part in choice)


def switch_on(model: MultimodalLM, choice: Checkpointing) -> None:
    """Let the layers of the named parts recompute; `set_mode` comes behind, since transformers looks at the mode.

    Raises:
        ValueError: a part's class has no layers that can.
    """
    for name in checkpointed(choice):
        if name == "connector":
            recompute_whole(model.connector)
        elif not recompute_layers(getattr(model, name)):
            raise ValueError(
                f"train.gradient_checkpointing: the layers of this {name} cannot be computed again: leave it out"
            )


def recompute_layers(part: nn.Module) -> int:
    """transformers' own switch, for every layer that has one; their number."""
    layers = [module for module in part.modules() if hasattr(module, "gradient_checkpointing")]
    for layer in layers:
        layer.gradient_checkpointing = True  # type: ignore[assignment]
        layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)  # type: ignore[assignment]
    return len(layers)


def recompute_whole(connector: nn.Module) -> None:
    """A connector is small: it is one piece."""
    if not hasattr(connector, "checkpointed"):
        connector.checkpointed = True  # type: ignore[assignment]
        connector.forward = partial(whole, connector, connector.forward)  # type: ignore[method-assign]


def whole(connector: nn.Module, forward: Callable[..., Any], *inputs: Any, **named: Any) -> Any:
    """`forward`, computed again in the backward pass while the connector is switched so."""
    if not connector.checkpointed:
        return forward(*inputs, **named)
    return checkpoint(forward, *inputs, **named, use_reentrant=False)


@contextmanager
def switched_off(module: nn.Module) -> Iterator[None]:
    """Nothing below is computed twice, while the context lasts."""
    names = ("checkpointed", "gradient_checkpointing")
    before = [(part, name) for part in module.modules() for name in names if getattr(part, name, False)]
    for part, name in before:
        setattr(part, name, False)
    try:
        yield
    finally:
        for part, name in before:
            setattr(part, name, True)


def advice(model: MultimodalLM, choice: Checkpointing) -> list[str]:
    """Where it cannot save memory, in words."""
    below = {"vision_encoder": (), "connector": ("vision_encoder",), "llm": ("connector", "vision_encoder")}
    return [
        f"train.gradient_checkpointing of the {name} saves no memory: it is frozen and nothing below it trains, so "
        f"nothing of it is kept for the backward pass"
        for name in checkpointed(choice)
        if not any(p.requires_grad for part in (name, *below[name]) for p in getattr(model, part).parameters())
    ]
