"""What to change where a step will not fit, each with the peak that it would have.

Enters: the model, the largest shape and the setup that do not fit. Leaves: settings with their predicted peak, those
first that change nothing of what is learned.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch

from mllm.models.multimodal import MultimodalLM
from mllm.train.forecasting.memory import Memory, moment_bytes, predict
from mllm.train.forecasting.shadow import Setup, Shape, size
from mllm.train.trainable import set_mode
from mllm.train.tuning.checkpointing import switch_on

BUCKET = 50_000_000
"""Numbers in a bucket, as the files in deepspeed_configs/ have it."""


@dataclass(frozen=True)
class Lever:
    """A change of settings."""

    change: str
    peak: int
    """Bytes of a rank, with this change alone."""


def levers(model: MultimodalLM, shape: Shape, setup: Setup) -> list[Lever]:
    """All that would help; a lever that saves nothing is left out."""
    before = predict(model, shape, setup).peak
    found = [Lever(change, memory.peak) for change, memory in tried(model, shape, setup)]
    if saved := whole_llm(model, setup):
        found.append(Lever("train.lora, in place of the whole LLM (about)", before - saved))
    return [lever for lever in found if lever.peak < before]


def tried(model: MultimodalLM, shape: Shape, setup: Setup) -> Iterator[tuple[str, Memory]]:
    if shape.rows > 1:
        half = cut(shape, rows=shape.rows // 2)
        more = replace(setup, accumulation=setup.accumulation * 2)
        yield f"train.rows_per_micro_batch {half.rows}", predict(model, half, more)
    if not checkpoints(model):
        with checkpointing(model):
            yield "train.gradient_checkpointing true", predict(model, shape, setup)
    sharded = replace(setup, bucket=setup.bucket or BUCKET)
    for stage in range(setup.stage + 1, 4 if setup.ranks > 1 else 0):
        yield f"ZeRO stage {stage} (accelerate_zero{stage}.yaml)", predict(model, shape, replace(sharded, stage=stage))
    if setup.device.type != "cpu" and not setup.offload_weights:
        offloaded = replace(sharded, stage=3, offload_moments=True, offload_weights=True)
        yield "ZeRO stage 3 with offload (accelerate_zero3_offload.yaml)", predict(model, shape, offloaded)
    if any(p.dtype == torch.float32 and not p.requires_grad for p in model.parameters()):
        yield "model.dtype bfloat16", predict(model, shape, replace(setup, frozen_dtype=torch.bfloat16))
    half = cut(shape, length=shape.length // 2)
    yield f"data.seq_length {half.length}, if no sample is longer", predict(model, half, setup)


def cut(shape: Shape, rows: int | None = None, length: int | None = None) -> Shape:
    """Fewer or shorter rows that are filled alike."""
    rows, length = rows or shape.rows, length or shape.length
    share = rows * length / (shape.rows * shape.length)
    return Shape(rows, length, round(shape.images * share), round(shape.supervised * share))


def checkpoints(model: MultimodalLM) -> bool:
    """Are the LLM's layers computed again in the backward pass?"""
    return any(getattr(layer, "gradient_checkpointing", False) for layer in model.llm.modules())


@contextmanager
def checkpointing(model: MultimodalLM) -> Iterator[None]:
    """As if it were switched on for the LLM."""
    names = ("training", "gradient_checkpointing")
    before = [(m, name, getattr(m, name)) for m in model.modules() for name in names if hasattr(m, name)]
    switch_on(model, True)
    set_mode(model)
    try:
        yield
    finally:
        for module, name, value in before:
            setattr(module, name, value)


def whole_llm(model: MultimodalLM, setup: Setup) -> int:
    """Moments and buckets of an LLM that trains without an adapter: the least that one would save."""
    if not all(parameter.requires_grad for parameter in model.llm.parameters()):
        return 0
    moments = moment_bytes(model.llm, setup.optimizer)
    if setup.stage:
        return moments // setup.ranks
    return moments + (sum(map(size, model.llm.parameters())) if setup.ranks > 1 else 0)
