"""The loader and the index beside what a competent person writes by hand, on the same samples.

Enters: drawn data. Leaves: functions that go through all samples once. All give batches in memory, uint8 pixels of
the same values. Ours also finds the labels, packs and counts; the others pad what they get.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from benchmarks.clock import Way
from benchmarks.drawn import SIDE, Drawn
from mllm.data.formats.llava import LlavaSource
from mllm.data.index import Index, build_index
from mllm.data.loader import PlannedBatches, Share, batches
from mllm.data.plan import Plan
from mllm.data.processor import Processor

SEQ_LENGTH, ROWS = 4096, 4
BATCH = 16
"""Samples of a padded batch: about what `ROWS` rows hold."""
ROLES = {"human": "user", "gpt": "assistant"}
Pair = tuple[Tensor, Tensor]


def index_of(path: Path, processor: Processor) -> Index:
    return build_index([LlavaSource(path=path)], processor, SEQ_LENGTH, progress=False)


def loader(index: Index, processor: Processor) -> Way:
    """Ours: planned, packed, with labels and positions."""

    def way() -> int:
        plan = Plan.from_lengths(index.length, SEQ_LENGTH, ROWS)
        dataset = PlannedBatches(index, plan, processor, Share(0, 1, ROWS))
        return sum(sum(map(len, batch["sample_ids"])) for batch in batches(dataset, 0, plan.steps(1), 0))

    return way


def plain(data: Drawn) -> Way:
    """Pillow, the tokenizer's chat template, and a loop."""
    records = json.loads(data.json.read_text())
    tokenizer = data.processor.tokenizer

    def one(record: dict[str, Any]) -> Pair:
        with Image.open(data.json.parent / record["image"]) as image:
            return pixels_by_hand(image.convert("RGB")), torch.tensor(tokens_by_hand(tokenizer, record))

    def way() -> int:
        done = 0
        for start in range(0, len(records), BATCH):
            pixel_values, _ = padded([one(record) for record in records[start : start + BATCH]])
            done += len(pixel_values)
        return done

    return way


def webdataset(data: Drawn) -> Way:
    """Its own pipeline, in this process."""
    import webdataset as wds

    tokenizer = data.processor.tokenizer
    names = [str(path) for path in data.shards]

    def one(found: dict[str, Any]) -> Pair:
        return pixels_by_hand(found["jpg"]), torch.tensor(tokens_by_hand(tokenizer, found["json"]))

    def way() -> int:
        pipeline = wds.WebDataset(names, shardshuffle=False).decode("pil").map(one)
        return sum(len(pixels) for pixels, _ in pipeline.batched(BATCH, collation_fn=padded))

    return way


def pixels_by_hand(image: Image.Image) -> Tensor:
    """[3, H, W] uint8: what CLIP's image processor makes before it normalises."""
    scale = SIDE / min(image.size)
    image = image.resize((int(image.width * scale), int(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - SIDE) // 2, (image.height - SIDE) // 2
    return torch.from_numpy(np.array(image.crop((left, top, left + SIDE, top + SIDE)))).permute(2, 0, 1)


def tokens_by_hand(tokenizer: PreTrainedTokenizerBase, record: dict[str, Any]) -> list[int]:
    """The conversation as the template prints it; no labels."""
    messages = [{"role": ROLES[turn["from"]], "content": turn["value"]} for turn in record["conversations"]]
    return tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True)["input_ids"]


def padded(samples: Sequence[Pair] | Iterable[Pair]) -> Pair:
    """[B, 3, H, W] and [B, T]."""
    pixels, tokens = zip(*samples, strict=True)
    return torch.stack(pixels), pad_sequence(list(tokens), batch_first=True)


def indexing(data: Drawn) -> Way:
    """Ours: counts of tokens and of supervised tokens, sizes, places, ids, faults, as columns."""
    return lambda: len(index_of(data.json, data.processor))


def counting(data: Drawn) -> Way:
    """By hand: how many tokens, and what the header says of the image."""
    tokenizer = data.processor.tokenizer

    def way() -> int:
        found = []
        for record in json.loads(data.json.read_text()):
            with Image.open(data.json.parent / record["image"]) as image:
                found.append((len(tokens_by_hand(tokenizer, record)), image.size))
        return len(found)

    return way
