"""What a run will need, told before its first step: memory of a rank, time, disk; and what to change if there is not
enough.

Enters: the model in which it is chosen what trains, the data's counts, the plan, the settings. Leaves: a `Forecast`,
which says itself in words, in tables and as JSON. Every rank asks, because the probe runs on each.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch

from mllm.data.index import Index
from mllm.data.plan import Plan
from mllm.data.processor import Processor
from mllm.data.streams.batches import Look
from mllm.data.streams.plan import StreamPlan
from mllm.models.multimodal import MultimodalLM
from mllm.train import engine
from mllm.train.engines import zero
from mllm.train.forecasting.flops import cost_of, executed
from mllm.train.forecasting.largest import largest
from mllm.train.forecasting.levers import Lever, levers
from mllm.train.forecasting.memory import Memory, predict
from mllm.train.forecasting.probe import Probe, made_up, probe
from mllm.train.forecasting.room import checkpoint_bytes, disk_free, filesystem, memory_for, stage_bytes
from mllm.train.forecasting.shadow import Setup, Shape
from mllm.train.settings import TrainConfig
from mllm.train.trainable import set_mode
from mllm.train.tuning import encoder_groups
from mllm.train.tuning.checkpointing import switch_on
from mllm.train.watching.clock import peak_of

if TYPE_CHECKING:
    from accelerate import Accelerator

SHARE_OF_PEAK = 0.4
"""Of the device's peak rate, where a step is not timed: what a careful run reaches."""
TOO_LONG = 60.0
"""Seconds that a probe may be expected to take; of longer ones the time is worked out."""


@dataclass(frozen=True)
class Disk:
    """Bytes."""

    checkpoint: int
    """Of one checkpoint."""
    kept: int
    """Checkpoints at one time, the one that is being written among them; 0 where none are written."""
    stage: int
    """Of the finished stage folder's tensors."""
    free: int
    features: int = 0
    """That a folder of kept features may still take of the same disk."""

    @property
    def needed(self) -> int:
        return self.checkpoint * self.kept + self.stage + self.features


@dataclass(frozen=True)
class Forecast:
    """All that was found out."""

    shape: Shape
    """Of the largest micro-batch."""
    memory: Memory | None
    """Of one rank; None where the LLM does not run without data."""
    available: int
    """Bytes that one rank may take."""
    seconds: float
    """Of one optimiser step, if all its micro-batches were as large as the largest."""
    tokens: float
    """Real tokens of one step over all ranks."""
    steps: int
    flops: float
    """Operations of one step on one rank."""
    disk: Disk
    probed: Probe | None
    """None where none ran; `why` says why."""
    why: str = ""
    unknown: str = ""
    """Why there is no `memory`."""
    levers: list[Lever] = field(default_factory=list)
    halves: bool = True
    """Does the engine compute in halves what does not fit?"""

    @property
    def fits(self) -> bool:
        """As far as is known."""
        return (self.memory is None or self.memory.peak <= self.available) and self.fits_probe

    @property
    def fits_probe(self) -> bool:
        """False where the probe ran out of memory."""
        return self.probed is None or self.probed.fits

    def as_json(self) -> dict[str, Any]:
        """Bytes, seconds, operations."""
        memory = {"peak": self.memory.peak, **asdict(self.memory)} if self.memory else None
        return {
            "micro_batch": asdict(self.shape),
            "memory_per_rank": memory,
            "memory_available": self.available,
            "fits": self.fits,
            "levers": [asdict(lever) for lever in self.levers],
            "probe": asdict(self.probed) if self.probed else {"skipped": self.why},
            "seconds_per_step": self.seconds,
            "eta_seconds": self.seconds * self.steps,
            "steps": self.steps,
            "tokens_per_step": self.tokens,
            "tokens_per_second": self.tokens / self.seconds,
            "flops_per_step": self.flops,
            "disk": {**asdict(self.disk), "needed": self.disk.needed},
        }


def forecast(
    accelerator: Accelerator,
    model: MultimodalLM,
    known: Index | Look,
    plan: Plan | StreamPlan,
    processor: Processor,
    train: TrainConfig,
    steps: int,
) -> Forecast:
    """Predict, and probe where that is possible."""
    switch_on(model, train.gradient_checkpointing)
    set_mode(model)
    model.encoder_batch = encoder_groups.chosen(accelerator, model, train)
    shape = largest(model, known, plan, train.rows_per_micro_batch)
    setup = replace(setup_of(accelerator, train), feature_cache=cache_bytes(accelerator, model, known, train))
    memory, why = predicted(model, shape, setup)
    available = memory_for(accelerator.device)
    flops = cost_of(model).flops(executed(made_up(model, shape, processor.num_visual_tokens)))
    expected = flops / (SHARE_OF_PEAK * peak(accelerator, model, train))
    reason = why_no_probe(accelerator, model, train, memory, available, expected)
    found = None if reason else probe(accelerator, model, shape, processor.num_visual_tokens, train.mixed_precision)
    fits = (memory is None or memory.peak <= available) and (not found or found.fits)
    return Forecast(
        shape=shape,
        memory=memory,
        available=available,
        seconds=(found.seconds if found and found.fits else expected) * setup.accumulation,
        tokens=tokens_per_step(known, plan),
        steps=steps,
        flops=flops * setup.accumulation,
        disk=disk_of(model, known, train),
        probed=found,
        why=reason,
        unknown=why,
        levers=[] if fits or memory is None else levers(model, shape, setup),
        halves=engine.halves(accelerator),
    )


def setup_of(accelerator: Accelerator, train: TrainConfig) -> Setup:
    """What the launcher chose, as far as memory depends on it."""
    stage, offloads, bucket = zero.stage(accelerator), (False, False), 0
    if stage:
        config = accelerator.state.deepspeed_plugin.deepspeed_config["zero_optimization"]
        offloads = tuple(bool(config.get(f"offload_{what}")) for what in ("optimizer", "param"))  # type: ignore[assignment]
        bucket = int(config.get("reduce_bucket_size", 5e8))
    ranks = accelerator.num_processes
    return Setup(
        device=accelerator.device,
        ranks=ranks,
        stage=3 if engine.shards_weights(accelerator) else stage,
        offload_moments=offloads[0],
        offload_weights=offloads[1],
        bucket=bucket,
        accumulation=max(1, train.rows_per_step // (ranks * train.rows_per_micro_batch)),
        mixed_precision=train.mixed_precision,
        optimizer=train.optimizer,
        fp8=train.fp8,
    )


def cache_bytes(accelerator: Accelerator, model: MultimodalLM, known: Index | Look, train: TrainConfig) -> int:
    """What kept features will take of the device's memory: they lie in the computer's."""
    if accelerator.device.type != "cpu" or not train.feature_cache:
        return 0
    return feature_bytes(model, known, train, train.feature_cache)


def feature_bytes(model: MultimodalLM, known: Index | Look, train: TrainConfig, gigabytes: float) -> int:
    """Of all images, as far as they have room."""
    encoder = model.vision_encoder
    blank = torch.zeros(1, encoder.num_patches, encoder.width, dtype=next(encoder.parameters()).dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=train.mixed_precision == "bf16"):
        one = model.pooled(blank).nbytes
    room = int(gigabytes * 2**30)
    return min(room, int(known.tiles.sum()) * one) if isinstance(known, Index) else room


def folder_bytes(model: MultimodalLM, known: Index | Look, train: TrainConfig) -> int:
    """What a folder of features may still grow by; 0 where it lies on another disk than what the run writes."""
    if not train.feature_cache_dir or filesystem(train.feature_cache_dir) != filesystem(train.output_dir):
        return 0
    there = sum(path.stat().st_size for path in train.feature_cache_dir.glob("*.features"))
    return max(0, feature_bytes(model, known, train, train.feature_cache_dir_gigabytes) - there)


def predicted(model: MultimodalLM, shape: Shape, setup: Setup) -> tuple[Memory | None, str]:
    """The memory, or why it cannot be told."""
    try:
        return predict(model, shape, setup), ""
    except NotImplementedError as error:
        return None, str(error)


def peak(accelerator: Accelerator, model: MultimodalLM, train: TrainConfig) -> float:
    """Operations a second, as the main process finds them: all ranks must come to one decision."""
    from accelerate.utils import broadcast_object_list

    found = [0.0]
    if accelerator.is_main_process:
        found = [peak_of(accelerator.device, torch.bfloat16 if train.mixed_precision == "bf16" else model.llm.dtype)]
    return float(broadcast_object_list(found)[0])


def why_no_probe(
    accelerator: Accelerator,
    model: MultimodalLM,
    train: TrainConfig,
    memory: Memory | None,
    available: int,
    expected: float,
) -> str:
    """The reason, the same on all ranks; empty where nothing speaks against it."""
    if not train.probe:
        return "train.probe is off"
    if engine.shards_weights(accelerator):
        return "off under ZeRO stage 3 and FSDP2, where each rank will hold a share of the weights only"
    if any(parameter.is_meta for parameter in model.parameters()):
        return "the LLM's weights are not read yet"
    if accelerator.device.type == "cpu" and memory and memory.peak > available:
        return "it would not fit"
    if expected > TOO_LONG:
        return f"it would take about {expected:,.0f} s on this device"
    return ""


def tokens_per_step(known: Index | Look, plan: Plan | StreamPlan) -> float:
    """Real tokens over all ranks; of a stream, rows are taken to be full."""
    if isinstance(plan, StreamPlan):
        return float(plan.rows_per_step * (plan.seq_length if plan.packing else known.length.mean()))
    longest = plan.seq_length if plan.packing else int(known.length.max())
    return float(plan.rows_per_step * longest * plan.fill())


def disk_of(model: MultimodalLM, known: Index | Look, train: TrainConfig) -> Disk:
    kept = train.keep_last + train.keep_best + 1 if train.save_every else 0
    free, features = disk_free(train.output_dir), folder_bytes(model, known, train)
    return Disk(checkpoint_bytes(model, train.optimizer), kept, stage_bytes(model), free, features)
