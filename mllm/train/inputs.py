"""What the forward pass of a micro-batch takes, on the device, with all that a device would have to be asked for.

Enters: a micro-batch on the host. Leaves: its tensors on the device, the places of its placeholders and of its
supervised tokens, and where its samples begin. Each of these is a search for what is not zero: on the host it costs
microseconds, on a device the host would wait for all work that is still to be done there.

K supervised tokens, N images, V visual tokens an image, M samples of the micro-batch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mllm.models.multimodal import MultimodalLM
from mllm.models.packed.boundaries import Boundaries, boundaries
from mllm.models.packed.choice import reads_boundaries
from mllm.models.splice import slot_numbers
from mllm.train.losses import Reduction, Supervision, model_inputs, supervision
from mllm.types import Batch


def step_inputs(batch: Batch, device: torch.device, model: MultimodalLM, reduction: Reduction) -> dict[str, Any]:
    """All arguments of `NextToken.forward`. Nothing waits for the device."""
    known: dict[str, Any] = {
        "slots": slot_numbers(batch["input_ids"] == model.image_token_id),  # [N * V]
        "chosen": supervision(batch["labels"], batch["position_ids"], reduction),  # [K]
        "reduction": reduction,
    }
    if device.type == "cuda" and reads_boundaries(model.llm):
        known["samples"] = boundaries(batch["position_ids"])  # [M + 1]
    return {**model_inputs(batch, device), **{name: sent(value, device) for name, value in known.items()}}


def sent(value: Any, device: torch.device) -> Any:
    """Tensors to the device, those of a tuple too. From pinned memory, else the host would wait for the copy."""
    if isinstance(value, Tensor):
        pinned = value.pin_memory() if device.type == "cuda" and not value.is_pinned() else value
        return pinned.to(device, non_blocking=True)
    if isinstance(value, Boundaries | Supervision):
        return type(value)(*(sent(part, device) for part in value))
    return value
