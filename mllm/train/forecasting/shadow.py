"""A training step on tensors without data: what autograd keeps, and what passes, in bytes.

Enters: a model in which it is chosen what trains, the shape of a micro-batch, what the launcher and the settings make
of a step. Leaves: for each part of the step, what is alive at its peak beside the weights. The model's own code runs
(torch's `FakeTensorMode`), so that gradient checkpointing, adapters, precision and frozen weights count as they will.

B rows, S tokens of a row, N images, K supervised positions, V visual tokens an image, D width of the LLM.
"""

from __future__ import annotations

import copy
import logging
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from mllm.models.connectors.qformer import LONGEST
from mllm.models.multimodal import MultimodalLM
from mllm.models.quantised import is_4bit
from mllm.models.splice import one_sequence
from mllm.train.forecasting.live_memory import Tracker
from mllm.train.head_loss import head_loss
from mllm.train.inputs import step_images


@dataclass(frozen=True)
class Shape:
    """Of a micro-batch: all that its memory depends on."""

    rows: int
    length: int
    """S, padding included."""
    images: int
    supervised: int
    """K over all rows."""


@dataclass(frozen=True)
class Setup:
    """What the launcher and the settings make of a step."""

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    ranks: int = 1
    stage: int = 0
    """Of DeepSpeed's ZeRO, 0 without it; 3 stands for FSDP2 too."""
    offload_moments: bool = False
    """Moments and gradients lie in the computer's memory (ZeRO offload)."""
    offload_weights: bool = False
    bucket: int = 0
    """Numbers in a bucket of ZeRO, in which gradients wait for the other ranks."""
    accumulation: int = 1
    mixed_precision: str = "no"
    optimizer: str = "adamw"
    fp8: bool = False
    """Frozen layers of the LLM keep two 8-bit copies of their weights."""
    frozen_dtype: torch.dtype | None = None
    """Of frozen weights, if it is to be another than theirs."""
    feature_cache: int = 0
    """Bytes that kept features may take, where they lie on the device itself (a CPU)."""


class Shadow(nn.Module):
    """The objective with counts in the place of what depends on data: which positions hold an image or a label. Runs
    forward and backward in one call, so that layers which are computed again find the same weights."""

    def __init__(self, model: MultimodalLM, tracker: Tracker, setup: Setup) -> None:
        super().__init__()
        self.model, self.tracker, self.setup = model, tracker, setup

    def forward(self, batch: dict[str, Tensor], supervised: int) -> None:
        mixed = self.setup.mixed_precision == "bf16"
        with torch.autocast(self.setup.device.type, torch.bfloat16) if mixed else nullcontext():
            loss = self.loss(batch, supervised)
        with self.tracker.during("backward"):
            loss.backward()

    def loss(self, batch: dict[str, Tensor], supervised: int) -> Tensor:
        """As `MultimodalLM.forward` and `NextToken.forward` compute it."""
        model, ids = self.model, batch["input_ids"]
        with self.tracker.during("forward"):
            shown = self.in_groups(batch["pixel_values"])
            visual = model.visual_tokens(shown, batch.get("instruction_ids"))  # [N, V, D] or [T, D]
            is_placeholder = ids == model.image_token_id  # [B, S]
            embeddings = model.llm.get_input_embeddings()(ids.masked_fill(is_placeholder, 0))  # [B, S, D]
            flat = one_sequence(visual).to(embeddings.dtype)
            embeddings = embeddings.masked_scatter(is_placeholder.unsqueeze(-1), flat)
            del shown, visual, flat
            decoder = model.llm.get_decoder()
            hidden = decoder(
                inputs_embeds=embeddings, position_ids=batch["position_ids"], use_cache=False
            ).last_hidden_state  # [B, S, D]
        with self.tracker.during("loss"):
            place = torch.empty(supervised, dtype=torch.int64, device=ids.device)
            weights = torch.empty(supervised, device=ids.device)
            return head_loss(model, hidden[:, :-1][place, place], place, weights)[0]

    def in_groups(self, pixels: Tensor) -> Tensor:
        """Features [N, P, Dv] where a step takes them in groups, else the pixels. Those of the group that this
        micro-batch has no use for stay there until its backward pass is done."""
        count = self.setup.accumulation
        bring: Callable[[Tensor], Tensor] = Tensor.contiguous if self.setup.device.type == "cpu" else torch.clone
        self.images = step_images(self.model, [pixels] * count, count, bring)
        return self.images.take(len(pixels)) if self.images else pixels


def trace(model: MultimodalLM, shape: Shape, setup: Setup) -> dict[str, Counter[str]]:
    """For each phase of a micro-batch, what is alive at its peak beside what stands: by the phase that made it."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    was, model.feature_cache = model.feature_cache, None
    hooks: list[Any] = []
    own = [(module, dict(module._parameters), dict(module._buffers)) for module in model.modules()]
    try:
        with FakeTensorMode(), torch.enable_grad(), unlogged():
            weights = {name: fake(tensor, setup) for name, tensor in named_tensors(model)}
            batch = batch_without_data(model, shape, setup.device)
            with Tracker([*weights.values(), *batch.values()]) as tracker:
                for weight in weights.values():
                    if weight.requires_grad:
                        watch_gradient(weight, tracker, setup.accumulation > 1)
                hooks = mark_encoder(model, tracker)
                torch.func.functional_call(Shadow(model, tracker, setup), prefixed(weights), (batch, shape.supervised))
    except Exception as error:  # a model's own code fails on such tensors in ways of its own; it is told, and probed
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise NotImplementedError(f"{type(model.llm).__name__} does not run without data: {first}") from error
    finally:
        model.feature_cache = was
        for hook in hooks:
            hook.remove()
        for module, parameters, buffers in own:
            give_back(module, parameters, buffers)
    return {phase: named(alive) for phase, alive in tracker.peaks.items() if phase}


@contextmanager
def unlogged() -> Iterator[None]:
    """torch logs an operation that does not run without data, with its traceback; here that is an answer."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(before)


def give_back(module: nn.Module, parameters: dict[str, Any], buffers: dict[str, Any]) -> None:
    """peft moves the weights of experts for the time of a forward pass; what has no data comes back as a buffer, into
    which `functional_call` then puts the weight."""
    if module._parameters.keys() != parameters.keys():
        for held, own in ((module._parameters, parameters), (module._buffers, buffers)):
            held.clear()
            held.update(own)


NAMES = {
    "forward": "activations",
    "loss": "logits and loss",
    "backward": "temporaries",  # gradients of activations, on their way
    "reduce": "temporaries",  # the same, behind the first gradient of a weight
}
"""What is made in a phase -> what it is called."""


def mark_encoder(model: MultimodalLM, tracker: Tracker) -> list[Any]:
    """Let the tracker know what the encoder makes."""
    return [
        model.vision_encoder.register_forward_pre_hook(lambda *_: setattr(tracker, "phase", "encoder")),
        model.vision_encoder.register_forward_hook(lambda *_: setattr(tracker, "phase", "forward")),
    ]


def named(alive: Counter[str]) -> Counter[str]:
    found: Counter[str] = Counter()
    for phase, count in alive.items():
        found[NAMES.get(phase, phase)] += count
    return found


def watch_gradient(weight: Tensor, tracker: Tracker, is_there: bool) -> None:
    """Let the tracker tell a gradient from what passes on the way to it; `is_there`: an earlier micro-batch left one.
    From the first one on buckets are filled."""
    if is_there:
        weight.grad = torch.empty_like(weight)
        tracker.count(weight.grad, "gradients")

    def arrived(parameter: Any) -> None:
        tracker.phase = "reduce"
        tracker.count(parameter.grad, "gradients")

    weight.register_post_accumulate_grad_hook(arrived)


def named_tensors(model: nn.Module) -> list[tuple[str, Tensor]]:
    return [*model.named_parameters(), *model.named_buffers()]


def prefixed(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"model.{name}": tensor for name, tensor in weights.items()}


def fake(tensor: Any, setup: Setup) -> Tensor:
    """One without data, of the size that the whole tensor has on the device."""
    shape = getattr(tensor, "ds_shape", tensor.shape)  # ZeRO stage 3 leaves an empty shard in its place
    new: Any = torch.empty(shape, dtype=held_as(tensor, setup), device=setup.device)
    if is_4bit(tensor):
        new.quant_state = fake_scales(tensor.quant_state, setup.device)
    return new.requires_grad_(tensor.requires_grad)


def fake_scales(state: Any, device: torch.device) -> Any:
    """What bitsandbytes keeps beside a weight of four bits, without data."""
    new = copy.copy(state)
    for name, value in vars(state).items():
        if isinstance(value, Tensor):
            setattr(new, name, torch.empty(value.shape, dtype=value.dtype, device=device))
    if state.state2 is not None:
        new.state2 = fake_scales(state.state2, device)
    return new


def held_as(tensor: Tensor, setup: Setup) -> torch.dtype:
    """The type of a weight's numbers on the device."""
    keep = tensor.requires_grad or not isinstance(tensor, nn.Parameter) or not tensor.is_floating_point()
    return tensor.dtype if keep else setup.frozen_dtype or tensor.dtype


def batch_without_data(model: MultimodalLM, shape: Shape, device: torch.device) -> dict[str, Tensor]:
    """What a micro-batch of that shape holds on the device; a blank image where it has none."""
    side = model.vision_encoder.grid.side
    tokens = {
        name: torch.empty(shape.rows, shape.length, dtype=torch.int64, device=device)
        for name in ("input_ids", "labels", "position_ids")
    }
    pixels = torch.uint8 if model.vision_encoder.normalisation else torch.float32
    images = max(1, shape.images)
    if getattr(model.connector, "instruct", False):
        tokens["instruction_ids"] = torch.empty(images, LONGEST, dtype=torch.int64, device=device)
    return {**tokens, "pixel_values": torch.empty(images, 3, side, side, dtype=pixels, device=device)}


def size(tensor: Any, dtype: torch.dtype | None = None) -> int:
    """Bytes of the whole tensor, or of one as large with numbers of that type; of four bits with their scales."""
    shape = getattr(tensor, "ds_shape", tensor.shape)
    own = int(shape.numel()) * (dtype or tensor.dtype).itemsize
    return own + scale_bytes(tensor.quant_state) if is_4bit(tensor) else own


def scale_bytes(state: Any) -> int:
    own = sum(value.untyped_storage().nbytes() for value in vars(state).values() if isinstance(value, Tensor))
    return own + (scale_bytes(state.state2) if state.state2 is not None else 0)
