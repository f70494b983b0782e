"""One forward and backward pass of the largest micro-batch, before the first step: what does not fit fails here, and
not late in the epoch; how long a step takes is known.

Enters: the model, in which it is chosen what trains, and the largest shape. Leaves: seconds and bytes. Nothing is
learned: weights, gradients and the state of the random numbers are as before. The micro-batch is made up (one token
repeated, blank images), so that no file is read. Each rank probes for itself; the slowest and the largest count.

B rows, S tokens of a row, N images, K supervised positions.
"""

from __future__ import annotations

import time
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from mllm.models.connectors.qformer import LONGEST
from mllm.models.multimodal import MultimodalLM
from mllm.train.forecasting.live_memory import Tracker
from mllm.train.forecasting.shadow import Shape
from mllm.train.losses import NextToken, model_inputs
from mllm.types import IGNORE_INDEX, Batch

if TYPE_CHECKING:
    from accelerate import Accelerator


SHORT = 0.5
"""Seconds of a first pass on a CPU below which a second one is timed, without what the first had to set up."""


@dataclass(frozen=True)
class Probe:
    """Of the slowest and the largest rank."""

    seconds: float
    """Of a forward and a backward pass."""
    passing: int
    """Bytes of what came and went: activations, logits, gradients. Weights are not among them."""
    fits: bool = True


def probe(
    accelerator: Accelerator, model: MultimodalLM, shape: Shape, visual_tokens: int, mixed_precision: str
) -> Probe:
    """Run it, on a model that is in the mode in which it will train; it is put on the device. `visual_tokens` is V."""
    objective = NextToken(model.to(accelerator.device))
    batch = made_up(model, shape, visual_tokens)
    was, model.feature_cache = model.feature_cache, None
    devices = [accelerator.device] if accelerator.device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices):
            start = time.perf_counter()
            passing = held(accelerator.device, objective, batch, mixed_precision)
            seconds = time.perf_counter() - start
            if accelerator.device.type == "cuda" or seconds < SHORT:
                seconds = timed(accelerator.device, objective, batch, mixed_precision)
        found = Probe(seconds, passing)
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        found = Probe(0.0, 0, fits=False)
    finally:
        model.feature_cache = was
        model.zero_grad(set_to_none=True)
    if accelerator.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(accelerator.device)  # what a run tells later is its own
    return worst(accelerator, found)


def held(device: torch.device, objective: nn.Module, batch: Batch, mixed_precision: str) -> int:
    """Bytes at the peak beside weights and batch."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run(device, objective, batch, mixed_precision)
        return torch.cuda.max_memory_allocated(device) - before
    tensors = [value for value in batch.values() if isinstance(value, torch.Tensor)]
    with Tracker([*objective.parameters(), *objective.buffers(), *tensors]) as tracker:
        run(device, objective, batch, mixed_precision)
    objective.zero_grad(set_to_none=True)
    return tracker.peak


def timed(device: torch.device, objective: nn.Module, batch: Batch, mixed_precision: str) -> float:
    """Seconds of a pass, behind one that has chosen its kernels."""
    objective.zero_grad(set_to_none=True)
    start = time.perf_counter()
    run(device, objective, batch, mixed_precision)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def run(device: torch.device, objective: nn.Module, batch: Batch, mixed_precision: str) -> None:
    with torch.autocast(device.type, torch.bfloat16) if mixed_precision == "bf16" else nullcontext():
        loss = objective(**model_inputs(batch, device))
    loss.backward()


def made_up(model: MultimodalLM, shape: Shape, visual_tokens: int) -> Batch:
    """A micro-batch of that shape: placeholders first, supervised tokens at the end of the rows, two samples a row."""
    side = model.vision_encoder.grid.side
    input_ids = torch.full((shape.rows * shape.length,), int(model.image_token_id == 0))  # any word
    images = shape.images
    if model.image_newline is not None:
        visual_tokens += 1
    # without its size an image has all tokens that it may have, and a tile no border: a few may find no room
    images = min(images, len(input_ids) // visual_tokens)
    input_ids[: images * visual_tokens] = model.image_token_id
    positions = torch.arange(shape.length) % -(-shape.length // 2)  # they restart, so that attention runs as if packed
    labels = torch.full((shape.rows, shape.length), IGNORE_INDEX)
    left = shape.supervised
    for row in labels:  # the first token of a row predicts, and is not predicted
        count = min(left, shape.length - 1)
        row[shape.length - count :] = 0
        left -= count
    pixels = torch.uint8 if model.vision_encoder.normalisation else torch.float32
    reads = getattr(model.connector, "instruct", False)
    return Batch(
        input_ids=input_ids.view(shape.rows, shape.length),
        labels=labels,
        position_ids=positions.repeat(shape.rows, 1),
        pixel_values=torch.zeros(max(1, images), 3, side, side, dtype=pixels),
        num_images=images,
        row_images=[images] + [0] * (shape.rows - 1),
        instruction_ids=torch.zeros(max(1, images), LONGEST, dtype=torch.int64) if reads else None,
        image_sizes=[[]] * shape.rows,
        sample_ids=[["made up"] * 2] * shape.rows,
        where=["made up"] * 2 * shape.rows,
        sources=[[0] * 2] * shape.rows,
        faults=[],
    )


def out_of_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def worst(accelerator: Accelerator, found: Probe) -> Probe:
    """The slowest and the largest of all ranks, told to each of them."""
    mine = torch.tensor([[found.seconds, found.passing, not found.fits]], dtype=torch.float32)
    seconds, passing, failed = accelerator.gather(mine.to(accelerator.device)).amax(0).tolist()
    return Probe(seconds, int(passing), not failed)
