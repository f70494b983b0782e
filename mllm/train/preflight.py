"""What is printed before the first step.

Enters: the model, the index or stream, the plan and the processor. Leaves: a table of what trains, the numbers of the
run, one sample rendered with its mask. What is checked meanwhile is `supervision`, what is predicted `forecast`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from mllm.data import chat
from mllm.data.index import Index
from mllm.data.indexing.tally import sentence
from mllm.data.plan import Plan
from mllm.data.planning import advisor
from mllm.data.processor import Processor
from mllm.data.streams.batches import Look, look
from mllm.data.streams.plan import StreamPlan
from mllm.data.streams.reader import Stream
from mllm.models.multimodal import MultimodalLM
from mllm.models.vocabulary import untrained_tokens
from mllm.train.forecasting.supervision import check_supervised_share, render_mask, supervised_share
from mllm.train.trainable import LearningRates, parts, refinements

if TYPE_CHECKING:
    from collections.abc import Iterable


SHOWN = ("trained", "frozen", "rate")
"""Of a part."""


def preflight(
    console: Console,
    model: MultimodalLM,
    rates: LearningRates,
    index: Index | Stream,
    plan: Plan | StreamPlan,
    processor: Processor,
    steps: int,
) -> Index | Look:
    """Print the run; refuse it if the labels are odd. Of a stream the first samples are all that is known: it gives
    back what is."""
    console.print(parts_table(model, rates))
    known = look(index) if isinstance(index, Stream) else index
    if isinstance(known, Look):
        console.print(stream_table(known, plan, processor, steps))
    else:
        assert isinstance(plan, Plan)
        console.print(numbers_table(known, plan, processor, steps))
        if plan.packing and (advice := advisor.warning(known.length, plan.seq_length)):
            console.print(Text.assemble(("warning: ", "bold yellow"), advice))
    console.print(template_line(model, processor))
    sample = known.sample(0)
    console.print(
        Text.assemble("first sample (supervised in green): ", render_mask(processor, sample, plan.seq_length))
    )
    check_supervised_share(known, processor, plan.seq_length)
    return known


def numbers(
    model: MultimodalLM,
    rates: LearningRates,
    known: Index | Look,
    plan: Plan | StreamPlan,
    processor: Processor,
    steps: int,
) -> dict[str, Any]:
    """The same as JSON; what nobody knows of a stream is null."""
    counted: dict[str, Any] = {"samples": None, "images": None, "tokens": None, "fill": None}
    if isinstance(known, Index) and isinstance(plan, Plan):
        tokens = int(known.length.sum(dtype=np.int64))
        counted = {
            "samples": known.tally.summary(),
            "images": known.num_images,
            "tokens": tokens,
            "fill": plan.fill(),
        }
    return {
        "parts": {part.name: {name: getattr(part, name) for name in SHOWN} for part in parts(model, rates)},
        **counted,
        "visual_tokens_per_image": processor.num_visual_tokens,
        "supervised_share": supervised_share(known, processor),
        "steps": steps,
        "rows_per_step": plan.rows_per_step,
        "seq_length": plan.seq_length,
    }


def parts_table(model: MultimodalLM, rates: LearningRates) -> Table:
    """Parts with their parameters, frozen and trained, and the rate; below a part what refines it."""
    table = Table("part", "frozen", "trained", "learning rate", title="what trains", title_justify="left")
    for part in parts(model, rates):
        rate = f"{part.rate:g}" if part.trained else "-"
        table.add_row(part.name, f"{part.frozen:,}", f"{part.trained:,}", rate)
        for words, trained, factor_rates in refinements(model, rates, part.name) if part.trained else []:
            table.add_row(Text(words), "", f"{trained:,}", factor_rates)
    return table


def numbers_table(index: Index, plan: Plan, processor: Processor, steps: int) -> Table:
    """The run in numbers, each with its unit."""
    rows = (
        ("samples", sentence(index.tally.summary())),
        ("images", f"{index.num_images:,} of {visual_tokens(processor)}"),
        ("tokens", f"{index.length.sum(dtype=np.int64):,} in all samples"),
        ("supervised share", f"{supervised_share(index, processor):.1%} of the text tokens"),
        ("steps", f"{steps:,} of {plan.rows_per_step} rows"),
        ("rows", f"{steps * plan.rows_per_step:,} of {plan.seq_length} tokens, {plan.fill():.1%} filled"),
    )
    return table_of(rows)


def stream_table(known: Look, plan: Plan | StreamPlan, processor: Processor, steps: int) -> Table:
    """The run in numbers, as far as a stream has them."""
    share = f"{supervised_share(known, processor):.1%} of the text tokens of the first {len(known.items):,} samples"
    rows = (
        ("samples", "streamed: read in the order of their files, not counted"),
        ("images", f"each {visual_tokens(processor)}"),
        ("supervised share", share),
        ("steps", f"{steps:,} of {plan.rows_per_step} rows"),
        ("rows", f"{steps * plan.rows_per_step:,} of {plan.seq_length} tokens"),
    )
    return table_of(rows)


def visual_tokens(processor: Processor) -> str:
    """How many an image becomes."""
    one, tiles = processor.num_visual_tokens, processor.slots.tile_range
    fewest, most = processor.slots.token_range
    if processor.slots.native_aspect:
        return f"{fewest} to {most} visual tokens (patches in its own aspect)"
    if processor.slots.tiling is None:
        return f"{one} visual tokens"
    return f"{fewest} to {most} visual tokens ({tiles[0]} to {tiles[1]} tiles of {one}, {processor.tiles})"


def template_line(model: MultimodalLM, processor: Processor) -> Text:
    """The tokens of the chat template, and whether the LLM has learned what they mean."""
    tokens = chat.template_tokens(processor.tokenizer)
    untrained = untrained_tokens(model.llm, tokens)
    if not untrained:
        looked = "all with rows that the LLM has learned" if untrained is not None else "rows not read yet"
        return Text(f"chat template: {' '.join(tokens)}, {looked}" if tokens else "chat template: plain words")
    learns = model.llm.get_input_embeddings().weight.requires_grad
    remedy = "they are trained here" if learns else "nothing here trains them: take the instruct model of this LLM"
    return Text.assemble(
        ("warning: ", "bold yellow"),
        f"rows of the LLM's embedding table look untrained: {' '.join(untrained)}; {remedy}",
    )


def table_of(rows: Iterable[tuple[str, str]]) -> Table:
    table = Table("", "", show_header=False, title="the run", title_justify="left")
    for row in rows:
        table.add_row(*row)
    return table
