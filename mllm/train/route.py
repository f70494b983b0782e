"""Which samples a run sees in which step, and which of them are this rank's.

Enters: the index or stream of the data, the settings, this rank's place. Leaves: the plan of the run, the same on every
rank, and the micro-batches of it that this rank computes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mllm.data.index import Index
from mllm.data.loader import DataConfig, PlannedBatches, Share
from mllm.data.plan import Plan
from mllm.data.planning.columns import Columns
from mllm.data.processor import Processor
from mllm.data.streams.batches import StreamedBatches
from mllm.data.streams.plan import StreamPlan
from mllm.data.streams.reader import Stream
from mllm.train.checkpoint import newest_state
from mllm.train.settings import TrainConfig

if TYPE_CHECKING:
    from accelerate import Accelerator


def make_plan(index: Index | Stream, data: DataConfig, train: TrainConfig, resume: bool = False) -> Plan | StreamPlan:
    """The plan of a run, the same on every rank; one that goes on knows from its checkpoint where it stood.

    Raises:
        ValueError: the checkpoint was made with another plan, or a stream that waited there changed.
    """
    plan: Plan | StreamPlan
    if isinstance(index, Stream):
        feeds, weights = index.feeds()
        plan = StreamPlan(feeds, data.seq_length, train.rows_per_step, weights, data.packing, index.tally)
    else:
        columns = Columns(index.length, index.tiles, index.source, index.group, index.weight)
        plan = Plan(columns, data.mixture, data.seq_length, train.rows_per_step, train.seed, data.packing)
    position = newest_state(train.output_dir, fingerprint(index, plan))["position"] if resume else None
    return plan.at(position) if position else plan


def fingerprint(index: Index | Stream, plan: Plan | StreamPlan) -> str:
    """What a checkpoint's step may be trusted with: these samples in this order."""
    return f"{plan.fingerprint()}-{index.fingerprint()}"


def deal(
    accelerator: Accelerator,
    index: Index | Stream,
    plan: Plan | StreamPlan,
    processor: Processor,
    train: TrainConfig,
) -> PlannedBatches | StreamedBatches:
    """This rank's micro-batches of the plan; a `ValueError` where the rows of a step cannot be dealt to the ranks."""
    length = plan.seq_length if train.compile else None
    share = Share(accelerator.process_index, accelerator.num_processes, train.rows_per_micro_batch, length)
    if isinstance(plan, StreamPlan):
        return StreamedBatches(plan, processor, share)
    assert isinstance(index, Index)
    return PlannedBatches(index, plan, processor, share)


def num_steps(plan: Plan | StreamPlan, train: TrainConfig) -> int:
    """Optimiser steps of the run; an epoch is packed once to count them."""
    return train.steps if train.steps is not None else plan.steps(train.epochs)
