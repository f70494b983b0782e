"""The product's own loop, and its model without that loop, on drawn samples.

Enters: a model in which it is chosen what trains, an index and a processor of drawn samples, the settings. Leaves:
loops that go on until the stopwatch has seen enough. `fit` is called as the recipes call it: its plan, its loader with
workers, its step, its metrics; no checkpoint, no audit.

B rows, S tokens of a row.
"""

from __future__ import annotations

import contextlib
import inspect
import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol
from unittest import mock

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from torch import Tensor
from torch.nn.functional import cross_entropy

from benchmarks.configurations import Configuration
from benchmarks.drawn_training import DrawnIndex, DrawnProcessor
from mllm.data.loader import DataConfig, batches
from mllm.data.plan import Plan
from mllm.data.planning.advisor import MULTIPLE, advise, best
from mllm.models.multimodal import MultimodalLM
from mllm.train.inputs import inputs_of
from mllm.train.loop import fit
from mllm.train.losses import NextToken, num_supervised
from mllm.train.optimizer import make_optimizer
from mllm.train.route import deal, make_plan
from mllm.train.settings import TrainConfig
from mllm.train.trainable import parameter_groups, set_mode
from mllm.train.tuning import compiling
from mllm.types import IGNORE_INDEX

STEPS = 10_000
"""Of a run that is ended long before."""
SHORTEST, LONGEST = 3584, 8192
"""Tokens of the rows among which the advisor chooses."""
HELD = 2
"""Steps that the bare loop goes round and round."""


class Watch(Protocol):
    """Who looks on: a `Stopwatch`, or nobody."""

    def look_at(self, objective: torch.nn.Module) -> None: ...

    def loads(self, batches: Iterator[Any]) -> Iterator[Any]: ...


def layout(lengths: Any, tokens: int) -> tuple[int, int]:
    """The advised length of a row, and how many rows hold about so many tokens."""
    longest = -(-int(max(lengths)) // MULTIPLE) * MULTIPLE
    length = best(advise(lengths, max(longest, min(LONGEST, tokens)), min(SHORTEST, tokens // 4))).seq_length
    return length, max(1, round(tokens / length))


def settings(configuration: Configuration, folder: Path, rows: int, bf16: bool) -> TrainConfig:
    """A run that does nothing but train."""
    return TrainConfig(
        output_dir=folder,
        learning_rate=configuration.rates,
        lora=configuration.adapter,
        steps=STEPS,
        rows_per_step=rows * configuration.accumulation,
        rows_per_micro_batch=rows,
        mixed_precision="bf16" if bf16 else "no",
        feature_cache=4.0 if configuration.cached else 0,
        log_every=STEPS,
        compile=configuration.compiled,
        fp8=configuration.fp8,
        probe=False,
        audit="off",
        hang_seconds=0,
    )


def data_settings(length: int, workers: int) -> DataConfig:
    return DataConfig(seq_length=length, num_workers=workers)


def plan_of(index: DrawnIndex, data: DataConfig, train: TrainConfig) -> Plan:
    plan = make_plan(index, data, train)
    assert isinstance(plan, Plan)
    return plan


class AllLogits(NextToken):
    """The loss as libraries compute it: float32 logits at every position."""

    def forward(self, labels: Tensor, reduction: Any = "token", each: bool = False, **inputs: Any) -> Any:  # type: ignore[override]
        """The sum, and with `each` the loss of each supervised token."""
        known = inspect.signature(self.model.forward).parameters
        hidden_states = self.model(**{name: value for name, value in inputs.items() if name in known})
        logits = self.model.logits(hidden_states).float()
        targets = labels[:, 1:].flatten()
        losses = cross_entropy(logits[:, :-1].flatten(0, 1), targets, reduction="none", ignore_index=IGNORE_INDEX)
        return (losses.sum(), losses.detach()[targets != IGNORE_INDEX]) if each else losses.sum()


def accelerate(train: TrainConfig, device: torch.device) -> Accelerator:
    """A fresh one: what an earlier run has left in it would stay in memory."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    return Accelerator(mixed_precision=train.mixed_precision, cpu=device.type == "cpu")


def loop(
    model: MultimodalLM,
    index: DrawnIndex,
    processor: DrawnProcessor,
    data: DataConfig,
    train: TrainConfig,
    device: torch.device,
    watch: Watch,
    objective: type[NextToken] = NextToken,
) -> None:
    """`fit`, until somebody ends it; the objective and the batches that it makes are shown to the watch."""

    def made(model: MultimodalLM) -> NextToken:
        watch.look_at(own := objective(model))
        return own

    def read(*arguments: Any) -> Iterator[Any]:
        return watch.loads(batches(*arguments))

    accelerator = accelerate(train, device)
    no_picture = mock.patch("mllm.train.metrics.draw_loss")
    try:
        with mock.patch("mllm.train.loop.NextToken", made), mock.patch("mllm.train.loop.batches", read), no_picture:
            plan: Any = plan_of(index, data, train)
            fit(accelerator, model, processor, index, plan, data, train)  # type: ignore[arg-type]
    finally:
        accelerator.free_memory()


def adapters_by_peft() -> AbstractContextManager[Any]:
    """LoRA without the short way in half precision."""
    return mock.patch("mllm.train.loop.fast_lora.switch_on", return_value=0)


@dataclass
class HeldStep:
    """A step's micro-batches on the device, without their pixels, which come together."""

    inputs: list[dict[str, Any]]
    images: list[int]
    pixels: Tensor
    """[N, 3, H, W] of all of them."""
    supervised: int


def bare(model: MultimodalLM, held: list[HeldStep], train: TrainConfig, objective: NextToken) -> Iterator[None]:
    """The same model and loss in a few lines of PyTorch, on batches that are on the device already; a step each."""
    set_mode(model)
    groups = parameter_groups(model, train.learning_rate, train.weight_decay)
    optimizer = make_optimizer(groups, train.optimizer)
    trained = [parameter for group in groups for parameter in group["params"]]
    autocast = partial(torch.autocast, held[0].pixels.device.type, torch.bfloat16, train.mixed_precision == "bf16")
    while True:
        for step in held:
            with torch.no_grad(), autocast():
                features = model.features(step.pixels).split(step.images)
            for inputs, own in zip(step.inputs, features, strict=True):
                with autocast():
                    loss = objective(**{**inputs, "pixel_values": own})
                (loss / step.supervised).backward()
            torch.nn.utils.clip_grad_norm_(trained, train.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            yield


def held(
    model: MultimodalLM,
    index: DrawnIndex,
    processor: DrawnProcessor,
    plan: Plan,
    data: DataConfig,
    train: TrainConfig,
    device: torch.device,
) -> list[HeldStep]:
    """The first steps of the plan on the device, for a model whose blocks are compiled as the loop compiles them."""
    accelerator = accelerate(train, device)
    dataset = deal(accelerator, index, plan, processor, train)  # type: ignore[arg-type]
    compiling.switch_on(accelerator, model, train, data)
    read, steps = list(batches(dataset, 0, HELD, 0)), []
    for first in range(0, len(read), dataset.accumulation):
        block = read[first : first + dataset.accumulation]
        assert all(batch["num_images"] for batch in block)
        inputs = [inputs_of(batch, device, model, "token", pixels=False) for batch in block]
        pixels = torch.cat([batch["pixel_values"] for batch in block]).to(device)
        images = [batch["num_images"] for batch in block]
        steps.append(HeldStep(inputs, images, pixels, sum(map(num_supervised, block))))
    return steps


@contextlib.contextmanager
def scratch() -> Iterator[Path]:
    """A folder for what a run writes."""
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)
