"""What is printed before the first step, and what stops a run there.

Enters: the model, the index or stream, the plan and the processor. Leaves: a table of what trains, the numbers of the
run, one sample rendered with its mask; or a `ValueError` that shows the mask, if the share of supervised tokens is odd.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

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
from mllm.train.trainable import LearningRates, parts, refinements
from mllm.types import IGNORE_INDEX, Sample

if TYPE_CHECKING:
    from collections.abc import Iterable

LOWEST_SHARE, HIGHEST_SHARE = 0.0005, 0.98
"""Supervised share of the text tokens. Above: the mask covers the prompt as well. Below: nearly nothing is learned
from."""
SHOWN_TOKENS = 160


def preflight(
    console: Console,
    model: MultimodalLM,
    rates: LearningRates,
    index: Index | Stream,
    plan: Plan | StreamPlan,
    processor: Processor,
    steps: int,
) -> None:
    """Print the run; refuse it if the labels are odd. Of a stream the first samples are all that is known."""
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
        ("images", f"{index.num_images:,} of {processor.num_visual_tokens} visual tokens"),
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
        ("images", f"each {processor.num_visual_tokens} visual tokens"),
        ("supervised share", share),
        ("steps", f"{steps:,} of {plan.rows_per_step} rows"),
        ("rows", f"{steps * plan.rows_per_step:,} of {plan.seq_length} tokens"),
    )
    return table_of(rows)


def template_line(model: MultimodalLM, processor: Processor) -> Text:
    """The tokens of the chat template, and whether the LLM has learned what they mean."""
    tokens = chat.template_tokens(processor.tokenizer)
    untrained = untrained_tokens(model.llm, tokens)
    if not untrained:
        rows = f"{' '.join(tokens)}, all with rows that the LLM has learned" if tokens else "plain words"
        return Text(f"chat template: {rows}")
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


def supervised_share(index: Index | Look, processor: Processor) -> float:
    """Supervised tokens among those that are text."""
    text = index.length.sum(dtype=np.int64) - index.num_images * processor.num_visual_tokens
    return float(index.supervised.sum(dtype=np.int64) / max(1, text))


def check_supervised_share(index: Index | Look, processor: Processor, seq_length: int) -> None:
    """Stop where the mask is wrong, and show it.

    Raises:
        ValueError: a sample has no supervised token, or the share over all is out of range.
    """
    silent = np.flatnonzero(index.supervised == 0)
    share = supervised_share(index, processor)
    if not len(silent) and LOWEST_SHARE <= share <= HIGHEST_SHARE:
        return
    shown = index.sample(int(silent[0]) if len(silent) else 0)
    what = "has no supervised token" if len(silent) else f"is one of samples whose supervised share is {share:.2%}"
    raise ValueError(
        f"{shown.where} {what}: the chat template of {processor.tokenizer.name_or_path} does not mark the assistant's "
        f"words as expected (supervised tokens stand between [[ and ]]):\n{mask_text(processor, shown, seq_length)}"
    )


def segments(processor: Processor, sample: Sample, seq_length: int) -> list[tuple[str, bool]]:
    """Decoded runs of tokens, each supervised or not; an image's slots are one short word."""
    ids, labels = processor.encode(sample, seq_length)
    runs: list[tuple[list[int], bool]] = []
    for token, label in zip(ids[:SHOWN_TOKENS], labels, strict=False):
        if token == processor.image_token_id and runs and runs[-1][0][-1] == token:
            continue
        if not runs or runs[-1][1] != (label != IGNORE_INDEX):
            runs.append(([], label != IGNORE_INDEX))
        runs[-1][0].append(token)
    return [(str(processor.tokenizer.decode(tokens)), is_supervised) for tokens, is_supervised in runs]


def render_mask(processor: Processor, sample: Sample, seq_length: int) -> Text:
    """One sample with its supervised words in green."""
    text = Text()
    for words, is_supervised in segments(processor, sample, seq_length):
        text.append(words, style="bold green" if is_supervised else "dim")
    return text


def mask_text(processor: Processor, sample: Sample, seq_length: int) -> str:
    """One sample with its supervised words in double brackets."""
    return "".join(f"[[{words}]]" if marked else words for words, marked in segments(processor, sample, seq_length))
