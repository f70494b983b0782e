"""The beginning and the end of a stage: ranks, seed, output folder, the errors that a user sees.

Enters: a `RunConfig`. Leaves: an `Accelerator`, the processor, an output folder that is free to be written; at the
end the stage folder. The recipes call these in order and read as a contents page.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from rich.console import Console

from mllm.config import RunConfig, dump_config
from mllm.data.held_out import index_held_out
from mllm.data.index import Index, build_index
from mllm.data.indexing.store import default_folder
from mllm.data.indexing.tally import sentence
from mllm.data.plan import Plan
from mllm.data.processor import Processor
from mllm.data.streams.batches import open_stream
from mllm.data.streams.plan import StreamPlan
from mllm.data.streams.reader import Stream
from mllm.full_disk import unwritten
from mllm.inherit import take_over
from mllm.models.attention import check_isolation, check_rotation
from mllm.models.build import (
    ModelConfig,
    attention_of,
    build_model,
    check_aspect,
    check_llm,
    check_rows,
    named,
    vision_grids,
    visual_tokens_per_image,
)
from mllm.models.deferred import CannotDefer, empty_llm
from mllm.models.multimodal import MultimodalLM
from mllm.models.packed.choice import check_attention
from mllm.output import check_output, remove
from mllm.quiet import quiet_libraries
from mllm.reload import check_reload
from mllm.resuming import check_steps
from mllm.train import engine, held_out
from mllm.train.audit import FILE as AUDIT_FILE
from mllm.train.audit import concluded
from mllm.train.checkpoint import newest
from mllm.train.forecasting.forecast import forecast
from mllm.train.forecasting.needs import refuse, tell
from mllm.train.forecasting.room import memory_for
from mllm.train.forecasting.shadow import size
from mllm.train.ledger import Quarantine
from mllm.train.preflight import numbers, preflight
from mllm.train.route import deal, make_plan, num_steps
from mllm.train.saving import durable
from mllm.train.saving.preemption import to_the_end
from mllm.train.stage_folder import FINISHED, needs_weights, save_stage
from mllm.train.tuning import checkpointing, compiling, fp8
from mllm.train.watching import trackers
from mllm.train.watching.stops import RankStopped

if TYPE_CHECKING:
    from accelerate import Accelerator

HEAVY = 10**9
"""Bytes of an LLM above which a CPU would take minutes for one micro-batch."""


def start(config: RunConfig) -> Accelerator:
    """Ranks, precision and seed; the merged config on the screen."""
    from accelerate import Accelerator
    from accelerate.utils import GradientAccumulationPlugin

    check_output(config)
    trackers.check(config.train.trackers)
    held_out.check(config.data, config.train)
    quiet_libraries()
    # the step counts its micro-batches itself: a number from `accelerate launch` would divide the gradient once more
    once = GradientAccumulationPlugin(num_steps=1)
    accelerator = Accelerator(
        mixed_precision=config.train.mixed_precision,
        gradient_accumulation_plugin=once,
        kwargs_handlers=engine.process_group(),
    )
    engine.confirm(accelerator)
    engine.check(accelerator, config.train, config.parts().quantisation)
    compiling.check(accelerator, config.train, config.data, config.parts().quantisation)
    torch.manual_seed(config.train.seed)
    console(accelerator).print(dump_config(config), highlight=False, style="dim")
    # said, because a launcher may start one process where two were meant, without an error
    console(accelerator).print(engine.describe(accelerator))
    return accelerator


def build_processor(config: RunConfig) -> Processor:
    """The processor of the parts, its visual tokens counted from config files alone."""
    parts = config.parts()
    visual_tokens = visual_tokens_per_image(parts)
    if config.data.tiles == "anyres":
        check_rows(parts)
    if config.data.image_fit == "aspect":
        check_aspect(parts)
    check_llm(parts)
    leading = parts.encoders()[0]
    with named("tokenizer or image processor", f"{parts.llm} or {leading}"):
        data = config.data
        instruct = getattr(parts.connector, "instruct", False)
        return Processor.from_hub(
            parts.llm,
            leading,
            visual_tokens,
            image_fit=data.image_fit,
            keep=data.keep_in_memory,
            jpeg_draft=data.jpeg_draft,
            instruct=instruct,
            image_markers=data.image_markers,
            tiles=data.tiles,
            max_tiles=data.max_tiles,
            patch=vision_grids(parts)[0].patch,
            video_frames=data.video_frames,
        )


def build(accelerator: Accelerator, config: RunConfig, processor: Processor) -> MultimodalLM:
    """The model of the config. Where each rank will keep a share of the weights only, the LLM is never whole on any, if
    its files and its adapter allow that; which of the two is said. A dry run does not read a large one at all."""
    sharded, adapter = engine.shards_weights(accelerator), needs_weights(config.init_from, config.train.lora)
    waits = sharded or (config.dry_run and is_heavy(config.parts(), accelerator.device))
    token, layout = processor.image_token_id, processor.layout
    model = build_model(config.parts(), token, deferred=waits and not adapter, layout=layout)
    if sharded:
        reason = getattr(model.llm, "whole_because", adapter)
        how = f"whole on each rank while it is built: {reason}" if reason else "one weight at a time into the shards"
        console(accelerator).print(f"the LLM is read {how}", highlight=False)
    return model


def is_heavy(parts: ModelConfig, device: torch.device) -> bool:
    """Is the LLM too large to be tried here, only to tell what it needs? Then its config alone is read."""
    try:
        weights = sum(map(size, empty_llm(parts.llm, getattr(torch, parts.dtype), attention_of(parts)).parameters()))
    except CannotDefer:
        return False
    return weights > (HEAVY if device.type == "cpu" else memory_for(device))


def inherit(accelerator: Accelerator, config: RunConfig, model: MultimodalLM) -> None:
    """Start from what an earlier stage learned, if the config names one."""
    if config.init_from:
        console(accelerator).print(take_over(config, model), highlight=False)


def read_data(accelerator: Accelerator, config: RunConfig, processor: Processor) -> Index | Stream:
    """The index of all sources; every record that cannot be used is known from here on. One process of each machine
    measures what is new, the others read what it wrote. Or a stream, of which nothing is known."""
    data = config.data
    if not data.sources:
        raise ValueError("no data: list at least one source under data.sources")
    folder = data.index_dir or default_folder()
    with accelerator.local_main_process_first():
        workers = data.num_workers * accelerator.num_processes if accelerator.is_local_main_process else 0
        index: Index | Stream
        if data.stream:
            index = open_stream(data, processor, config.train.seed)
        else:
            taken_out = data.held_out if isinstance(data.held_out, int) else 0
            is_main = accelerator.is_main_process
            index = build_index(data.sources, processor, data.seq_length, workers, folder, is_main, taken_out)
        index_held_out(index, data, processor, workers, folder)
        return index


def plan_run(config: RunConfig, index: Index | Stream) -> Plan | StreamPlan:
    """Which samples come in which step; stop where too many of them are bad."""
    index.check(config.data.max_bad_share)
    return make_plan(index, config.data, config.train, config.resume)


def check_run(
    accelerator: Accelerator,
    config: RunConfig,
    model: MultimodalLM,
    processor: Processor,
    index: Index | Stream,
    plan: Plan | StreamPlan,
) -> None:
    """Tell the run before its first step; stop it where data or labels are wrong."""
    check_attention(config.parts().attention, model.llm, accelerator.device)
    fp8.check(accelerator, model, config.train)
    if config.data.packing:
        check_isolation(model.llm)
    if config.data.packing or config.train.rows_per_micro_batch > 1:
        check_rotation(model.llm, plan.seq_length if isinstance(index, Stream) else int(index.length.max()))
    deal(accelerator, index, plan, processor, config.train)
    with console(accelerator).status("counting the steps"):
        steps = num_steps(plan, config.train)
    if config.resume:
        check_steps(config.train.output_dir, steps)
    rates = config.train.learning_rate
    known = preflight(console(accelerator), model, rates, index, plan, processor, steps)
    for words in checkpointing.advice(model, config.train.gradient_checkpointing):
        console(accelerator).print(f"[bold yellow]warning[/]: {words}")
    needs = forecast(accelerator, model, known, plan, processor, config.train, steps)
    tell(console(accelerator), needs, whole=config.dry_run)
    if config.json and accelerator.is_main_process:
        told = {**numbers(model, rates, known, plan, processor, steps), **needs.as_json()}
        config.json.parent.mkdir(parents=True, exist_ok=True)
        config.json.write_text(json.dumps(told, indent=1) + "\n")
    if not config.dry_run:
        refuse(needs)


def open_stage(accelerator: Accelerator, config: RunConfig, index: Index | Stream) -> None:
    """Make the output folder ours: emptied, resumed or new; config and skipped records are written down."""
    folder = config.train.output_dir
    if accelerator.is_main_process:
        if config.overwrite:
            remove(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / FINISHED).unlink(missing_ok=True)
        durable.heal(folder)
        durable.heal(folder / "checkpoints")
        durable.write_text(folder / "config.yaml", dump_config(config))
        Quarantine(folder).add([*index.faults, *(index.held_out.faults if index.held_out else [])])
    accelerator.wait_for_everyone()
    if config.resume:
        found = newest(folder)
        console(accelerator).print(
            f"resume: going on from {found}" if found else "resume: nothing saved yet, from step 0"
        )


@to_the_end()
def close_stage(accelerator: Accelerator, config: RunConfig, model: MultimodalLM, processor: Processor) -> None:
    """Write the stage folder."""
    is_main = accelerator.is_main_process
    save_stage(config.train.output_dir, model, processor, dump_config(config), is_main)
    check_written(accelerator, config, model, processor)
    if is_main:
        ledger = json.loads((config.train.output_dir / "ledger.json").read_text())
        console(accelerator).print(f"samples: {sentence(ledger)}\n[bold green]finished[/]: {config.train.output_dir}")
    accelerator.wait_for_everyone()
    accelerator.end_training()


def check_written(accelerator: Accelerator, config: RunConfig, model: MultimodalLM, processor: Processor) -> None:
    """The end of the audit: the stage on disk must say what the model in memory says.

    Raises:
        ValueError: on every rank, where it does not, or where a frozen weight moved.
    """
    if config.train.audit == "off":
        return
    folder, wrong = config.train.output_dir, ""
    reloaded = check_reload(accelerator, model, processor, folder, config.train.audit)
    if accelerator.is_main_process:
        wrong = concluded(folder, reloaded, console(accelerator))
    if accelerator.reduce(torch.tensor(float(bool(wrong)), device=accelerator.device), "sum"):
        accelerator.end_training()
        raise ValueError(f"the audit failed: {wrong or 'the first rank says why'} ({folder / AUDIT_FILE})")


def console(accelerator: Accelerator) -> Console:
    """The screen of rank 0; the others are mute."""
    return Console(quiet=not accelerator.is_main_process)


@contextlib.contextmanager
def user_errors() -> Iterator[None]:
    """A user's mistake, or a full disk, is told in words, without a traceback, and ends the run with exit code 2. What
    another rank ran into, or all ranks, is said once."""
    try:
        yield
    except ValueError as error:
        if not getattr(error, "silent", False):
            print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except RankStopped as error:
        sys.exit(error.code)
    except Exception as error:
        if not (words := unwritten(error)):
            raise
        print(
            f"error: the disk takes no more: {words}. Make room; --resume goes on from the newest checkpoint",
            file=sys.stderr,
        )
        sys.exit(2)
