"""The loop: one for every stage, on Accelerate.

Enters: a model whose trainable parts are chosen, the index of its data, the settings. Leaves: the trained model; on
the way a line of metrics a step, and checkpoints from which the same losses go on.

The loss of a step is one weighted sum over all supervised tokens of its rows, divided by the sum of the weights, on
however many ranks and in however many micro-batches the rows are computed: that sum is known, and shared, before the
first backward pass.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch

from mllm.data.formats.source import labels
from mllm.data.index import Index
from mllm.data.loader import DataConfig, batches
from mllm.data.plan import Plan
from mllm.data.processor import Processor
from mllm.data.streams.plan import StreamPlan
from mllm.data.streams.reader import Stream
from mllm.models.multimodal import MultimodalLM
from mllm.train import engine, feature_caching
from mllm.train.audit import Audit
from mllm.train.blip2 import objective as blip2
from mllm.train.checkpoint import load_optimizer, load_weights, newest_state, save_checkpoint
from mllm.train.engines import zero
from mllm.train.guard import Guard
from mllm.train.halving import Room
from mllm.train.held_out import HeldOut
from mllm.train.ledger import Ledger
from mllm.train.losses import NextToken
from mllm.train.metrics import Metrics
from mllm.train.optimizer import make_optimizer
from mllm.train.route import deal, fingerprint, num_steps
from mllm.train.saving.preemption import Preemption
from mllm.train.saving.retention import metric
from mllm.train.schedule import rate_factor, rates, set_rates
from mllm.train.settings import TrainConfig
from mllm.train.step import optimise
from mllm.train.trainable import parameter_groups, set_mode
from mllm.train.tuning import checkpointing, compiling, fast_lora, fp8, fp8_gate
from mllm.train.watchdog import Watchdog
from mllm.train.watching.clock import make_clock

if TYPE_CHECKING:
    from accelerate import Accelerator


def fit(
    accelerator: Accelerator,
    model: MultimodalLM,
    processor: Processor,
    index: Index | Stream,
    plan: Plan | StreamPlan,
    data: DataConfig,
    train: TrainConfig,
    resume: bool = False,
    learns: type[NextToken] | None = None,
) -> None:
    """Train in place. What is learned is the next token, or what another objective says.

    Raises:
        ValueError: the rows of a step cannot be dealt to the ranks; too many samples turn out unreadable.
    """
    engine.check(accelerator, train)
    dataset = deal(accelerator, index, plan, processor, train)
    clock = make_clock(model, accelerator.device, train.mixed_precision == "bf16")
    checkpointing.switch_on(model, train.gradient_checkpointing)
    fp8.switch_on(accelerator, model, train)
    fast_lora.switch_on(accelerator, model, train.mixed_precision)
    compiling.switch_on(accelerator, model, train, data)
    set_mode(model)
    cache = feature_caching.switch_on(accelerator, model, processor, index, plan, train)
    groups = parameter_groups(model, train.learning_rate, train.weight_decay)
    name, last_step = fingerprint(index, plan), num_steps(plan, train)
    first_step = load_weights(train.output_dir, model, name) if resume else 0
    zero.settle(accelerator, train, dataset.accumulation)
    make = partial(make_optimizer, name=train.optimizer)
    objective, optimizer, trained = engine.prepare(accelerator, (learns or NextToken)(model), groups, make)
    if first_step:
        load_optimizer(train.output_dir, model, optimizer, trained)
    ledger, guard = Ledger(train.output_dir, index.tally, data.max_bad_share), Guard(train.guard, train.output_dir)
    if isinstance(index, Stream) and accelerator.is_main_process:
        index.tell = ledger.quarantine.add
    if resume:
        ledger.resume(accelerator, first_step, newest_state(train.output_dir, name)["position"])
        guard.resume(accelerator, first_step)
    watchdog = Watchdog(accelerator, train.output_dir, train.hang_seconds, train.hang_stop_seconds, train.compile)
    micro_batches = batches(dataset, first_step, last_step, data.num_workers, watchdog.asked)
    micro_batches = feature_caching.one_ahead(cache, micro_batches, dataset.accumulation)
    micro_batches = watchdog.loaded(micro_batches, first_step, dataset.accumulation)
    take_step = partial(
        optimise,
        accelerator,
        objective,
        optimizer,
        max_grad_norm=train.max_grad_norm,
        reduction=train.loss_reduction,
        sources=labels(index.sources),
        guard=guard,
        room=Room(),
        beat=watchdog.beat,
    )
    save = partial(
        save_checkpoint,
        train.output_dir,
        model=model,
        optimizer=optimizer,
        trained=trained,
        fingerprint=name,
        is_main=accelerator.is_main_process,
        keep_last=train.keep_last,
        keep_best=train.keep_best,
    )
    preemption = Preemption(accelerator, last_step)
    with watchdog, preemption, Metrics(accelerator, train, first_step, last_step) as metrics:
        audit = Audit(accelerator, model, train.audit, train.output_dir, metrics.say)
        held_out = HeldOut(accelerator, index.held_out, processor, data, train, last_step, metrics.say, watchdog.beat)
        for step in range(first_step, last_step):
            torch.manual_seed(step_seed(train.seed, step, accelerator.process_index))
            set_rates(optimizer, rate_factor(step, last_step, train.warmup, train.schedule))
            block = clock.block(micro_batches, dataset.accumulation)
            if step == first_step:
                fp8_gate.choose(accelerator, model, train, block, resume, metrics.say)
            numbers = take_step(block)
            watchdog.beat("after the step", slow=True)
            numbers = guard.note(accelerator, step + 1, numbers)
            numbers |= {**plan.counts(step), **rates(optimizer), **clock.lap(plan.counts(step)["tokens"])}
            numbers = blip2.told(accelerator, objective, numbers)
            numbers |= held_out.at(step + 1, objective, model)
            ledger.note(accelerator, block, plan, step)
            metrics.step(step + 1, {**numbers, "skipped": ledger.tally.holes.total()})
            if preemption.stops(step + 1) or is_due(step + 1, train.save_every):
                position = {**plan.position(step + 1), **ledger.position()}
                save(step + 1, position=position, metric=metric(metrics.lines))
                audit.first_save(step + 1 - first_step)
            if preemption.step:
                break
        else:
            audit.finish(last_step - first_step)
    feature_caching.finish(cache)
    if accelerator.is_main_process:
        ledger.write()
    accelerator.wait_for_everyone()
    preemption.leave(train.output_dir)


def is_due(step: int, every: int | None) -> bool:
    """Does a checkpoint follow this step?"""
    return every is not None and step % every == 0


def step_seed(seed: int, step: int, rank: int) -> int:
    """What dropout draws from: a function of the position, so that a resumed run needs no random state."""
    return int(np.random.SeedSequence((seed, step, rank)).generate_state(1)[0])
