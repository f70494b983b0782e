"""The beginning and the end of a stage: ranks, seed, output folder, the errors that a user sees.

Enters: a `RunConfig`. Leaves: an `Accelerator`, an output folder that is free to be written; at the end the stage
folder. What a run is made of is put together in `assembly.py`. The recipes call both and read as a contents page.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

from mllm.config import RunConfig, dump_config
from mllm.data.index import Index
from mllm.data.indexing.tally import sentence
from mllm.data.plan import Plan
from mllm.data.processor import Processor
from mllm.data.streams.plan import StreamPlan
from mllm.data.streams.reader import Stream
from mllm.full_disk import unwritten
from mllm.models.attention import check_isolation, check_length, check_rotation
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
from mllm.train.ledger import Quarantine
from mllm.train.preflight import numbers, preflight
from mllm.train.route import deal, num_steps
from mllm.train.saving import durable
from mllm.train.saving.preemption import to_the_end
from mllm.train.stage_folder import FINISHED, save_stage
from mllm.train.tuning import checkpointing, compiling, fp8
from mllm.train.watching import trackers
from mllm.train.watching.console import console
from mllm.train.watching.stops import RankStopped

if TYPE_CHECKING:
    from accelerate import Accelerator


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
    longest = plan.seq_length if isinstance(index, Stream) else int(index.length.max())
    if config.data.packing or config.train.rows_per_micro_batch > 1:
        check_rotation(model.llm, longest)
    warnings = [words for words in [check_length(model.llm, longest)] if words]
    deal(accelerator, index, plan, processor, config.train)
    with console(accelerator).status("counting the steps"):
        steps = num_steps(plan, config.train)
    if config.resume:
        check_steps(config.train.output_dir, steps)
    rates = config.train.learning_rate
    known = preflight(console(accelerator), model, rates, index, plan, processor, steps)
    for words in [*warnings, *checkpointing.advice(model, config.train.gradient_checkpointing)]:
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
