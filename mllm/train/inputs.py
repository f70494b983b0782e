"""What the forward passes of a step take, on the device, with all that a device would have to be asked for.

Enters: the micro-batches of a step, on the host. Leaves: for one after the other its tensors on the device, the places
of its placeholders and of its supervised tokens, and where its samples begin. Each of these is a search for what is not
zero: on the host it costs microseconds, on a device the host would wait for all work that is still to be done there.

While a micro-batch is computed the next one is copied, on a stream of its own, which is one for the whole run: each
stream keeps the memory that it was once given. Where the encoder is frozen and takes
its images in groups (`models/image_groups.py`), or a folder keeps what it gave (`models/stored_features.py`), features
come in the place of pixels.

K supervised tokens, N images, P patches, Dv width of the features, V visual tokens an image, M samples.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mllm.models.image_groups import StepImages
from mllm.models.multimodal import MultimodalLM
from mllm.models.packed.boundaries import Boundaries, boundaries
from mllm.models.packed.choice import reads_boundaries
from mllm.models.splice import slot_numbers
from mllm.models.stored_features import StepFeatures, StoredFeatures
from mllm.train import engine
from mllm.train.losses import Reduction, Supervision, model_inputs, supervision
from mllm.types import Batch

if TYPE_CHECKING:
    from accelerate import Accelerator


class StepInputs:
    """The micro-batches of one step, each asked for once, in their order."""

    def __init__(
        self, accelerator: Accelerator, model: MultimodalLM, parts: Sequence[Batch], reduction: Reduction
    ) -> None:
        self.accelerator, self.model, self.parts, self.reduction = accelerator, model, parts, reduction
        self.stream = copy_stream(accelerator.device)
        pixels = [batch["pixel_values"] for batch in parts if batch["num_images"]]
        self.images = step_images(model, pixels, len(parts), self.bring)
        self.sent: dict[str, Any] = {}
        self.asked = 0

    def next(self) -> dict[str, Any]:
        """All arguments of `NextToken.forward`; the host waits for nothing."""
        if not self.asked:
            self.send()
        inputs, batch = self.sent, self.parts[self.asked]
        if self.stream:
            torch.cuda.current_stream().wait_stream(self.stream)
            keep(inputs)
        if self.images:
            with engine.autocast(self.accelerator):
                inputs["pixel_values"] = self.features(batch["num_images"])
        self.asked += 1
        self.send()
        return inputs

    def send(self) -> None:
        """Begin the copy of the one that is next."""
        if self.asked < len(self.parts):
            batch, device = self.parts[self.asked], self.accelerator.device
            with torch.cuda.stream(self.stream) if self.stream else nullcontext():
                self.sent = inputs_of(batch, device, self.model, self.reduction, pixels=self.images is None)

    def bring(self, tensor: Tensor) -> Tensor:
        """To the device, while it still computes what it was told before; what is told behind waits for the copy."""
        with torch.cuda.stream(self.stream) if self.stream else nullcontext():
            there: Tensor = sent(tensor, self.accelerator.device)
        if self.stream:
            torch.cuda.current_stream().wait_stream(self.stream)
            keep(there)
        return there

    def features(self, images: int) -> Tensor:
        """[max(N, 1), P, Dv]; any will do where there is no image, since they count nothing."""
        assert self.images
        if images:
            return self.images.take(images)
        encoder = self.model.vision_encoder
        return torch.zeros(1, encoder.num_patches, encoder.width, device=self.accelerator.device)


def step_images(
    model: MultimodalLM, pixels: Sequence[Tensor], micro_batches: int, bring: Callable[[Tensor], Tensor]
) -> StepImages | StepFeatures | None:
    """Where features can be had before the forward pass that reads them: of a frozen encoder, from a folder or in
    groups. `pixels` [n, 3, H, W] are those of each micro-batch that has any; groups that nobody asked for are for
    several micro-batches."""
    groups, cache = model.encoder_batch, model.feature_cache
    stored = cache if isinstance(cache, StoredFeatures) else None
    grouped = groups and not cache and (groups.filled or micro_batches > 1)
    if not (stored or grouped) or any(parameter.requires_grad for parameter in model.vision_encoder.parameters()):
        return None
    if stored:
        return stored.step(model.kept, pixels, bring)
    assert groups
    return StepImages(model.vision_encoder, pixels, groups, bring, model.fewest_images)


def inputs_of(
    batch: Batch, device: torch.device, model: MultimodalLM, reduction: Reduction, pixels: bool = True
) -> dict[str, Any]:
    """Those of one micro-batch, with or without its pixels."""
    known: dict[str, Any] = {
        "slots": slot_numbers(batch["input_ids"] == model.image_token_id),  # [N * V]
        "chosen": supervision(batch["labels"], batch["position_ids"], reduction),  # [K]
        "reduction": reduction,
    }
    if device.type == "cuda" and reads_boundaries(model.llm):
        known["samples"] = boundaries(batch["position_ids"])  # [M + 1]
    given = batch if pixels else Batch({**batch, "pixel_values": torch.empty(0)})  # type: ignore[typeddict-item]
    return {**model_inputs(given, device), **{name: sent(value, device) for name, value in known.items()}}


def sent(value: Any, device: torch.device) -> Any:
    """Tensors to the device, those of a tuple too. From pinned memory, else the host would wait for the copy."""
    if isinstance(value, Tensor):
        pinned = value.pin_memory() if device.type == "cuda" and not value.is_pinned() else value
        return pinned.to(device, non_blocking=True)
    if isinstance(value, Boundaries | Supervision):
        return type(value)(*(sent(part, device) for part in value))
    return value


@functools.cache
def copy_stream(device: torch.device) -> torch.cuda.Stream | None:
    """Beside that which computes, and always the same: torch would hand out 32, and keep memory for each."""
    return torch.cuda.Stream(device) if device.type == "cuda" else None


def keep(value: Any) -> None:
    """What was made on the copying stream is used on the computing one: its memory is not given away before."""
    if isinstance(value, Tensor):
        value.record_stream(torch.cuda.current_stream())
    for part in value.values() if isinstance(value, dict) else value if isinstance(value, tuple) else ():
        keep(part)
