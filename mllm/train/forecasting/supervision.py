"""Do the labels make sense? Asked before the first step, of all samples.

Enters: the counts of an index, or of the first samples of a stream, and the processor. Leaves: one sample rendered
with its mask, and a `ValueError` that shows the mask if the share of supervised tokens is odd.
"""

from __future__ import annotations

import numpy as np
from rich.text import Text

from mllm.data.index import Index
from mllm.data.processor import Processor
from mllm.data.streams.batches import Look
from mllm.types import IGNORE_INDEX, Sample

LOWEST_SHARE, HIGHEST_SHARE = 0.0005, 0.98
"""Supervised share of the text tokens. Above: the mask covers the prompt as well. Below: nearly nothing is learned
from."""
SHOWN_TOKENS = 160


def supervised_share(index: Index | Look, processor: Processor) -> float:
    """Supervised tokens among those that are text."""
    text = index.length.sum(dtype=np.int64) - visual_tokens(index, processor)
    return float(index.supervised.sum(dtype=np.int64) / max(1, text))


def visual_tokens(index: Index | Look, processor: Processor) -> int:
    """Of all samples, newlines among them."""
    layout = processor.layout
    if layout is None:
        return int(index.tiles.sum()) * processor.num_visual_tokens
    if isinstance(index, Look):
        return sum(item.tokens[0].count(processor.image_token_id) for item in index.items)
    sizes, images = np.unique(index.sizes.flatten().to_numpy().reshape(-1, 2), axis=0, return_counts=True)
    return sum(layout.num_tokens(*size) * number for size, number in zip(sizes.tolist(), images.tolist(), strict=True))


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
