"""From a config to what a run is made of: processor, model, index, plan.

Enters: a `RunConfig`. Leaves: each of them, checked against the others by whoever can do so without pixels or weights.
The recipes call these in order.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from mllm.config import RunConfig
from mllm.data.held_out import index_held_out
from mllm.data.index import Index, build_index
from mllm.data.indexing.store import default_folder
from mllm.data.plan import Plan
from mllm.data.processor import Processor
from mllm.data.streams.batches import open_stream
from mllm.data.streams.plan import StreamPlan
from mllm.data.streams.reader import Stream
from mllm.inherit import take_over
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
from mllm.train import engine
from mllm.train.forecasting.room import memory_for
from mllm.train.forecasting.shadow import size
from mllm.train.route import make_plan
from mllm.train.stage_folder import needs_weights
from mllm.train.watching.console import console

if TYPE_CHECKING:
    from accelerate import Accelerator

HEAVY = 10**9
"""Bytes of an LLM above which a CPU would take minutes for one micro-batch."""


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
