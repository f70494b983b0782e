"""What a data set is made of: lengths, fill of rows, image sizes, sources, what is learned.

    python data_scripts/stats.py data.json --out runs/stats --llm Qwen/Qwen3-0.6B --seq-length 4096
    python data_scripts/stats.py --config recipes/llava15/finetune.yaml --out runs/stats
    python data_scripts/stats.py *.jsonl --out runs/stats

Enters: files as `data.sources` takes them, or a recipe's YAML, whose sources, tokenizer, visual tokens and row length
are then used. Leaves, in `--out`: `stats.html` (one file that needs no other), `stats.png` and `stats.json`. Without a
tokenizer lengths are in words. Exit code: 0 done, 2 it could not be done, 130 stopped by Ctrl-C.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro
from rich.console import Console

from mllm.data.crew import cores
from mllm.data.curation.door import run
from mllm.data.curation.source_options import in_words, source_of
from mllm.data.curation.statistics import examples, statistics
from mllm.data.curation.word_counter import BEGINNING, WordCounter
from mllm.data.formats.source import Source
from mllm.data.index import build_index
from mllm.data.indexing.store import default_folder
from mllm.data.processor import Processor
from mllm.evaluate.data_report import write_data_report
from mllm.evaluate.data_report.page import thumbnail
from mllm.evaluate.data_report.words import headlines
from mllm.quiet import quiet_libraries

UNCUT = 2**30
"""Tokens: no sample is longer, so that lengths are told as they are."""
LLAVA15 = 576
"""Visual tokens of an image in LLaVA-1.5: 336 pixels in patches of 14."""


@dataclass
class Asked:
    """Whose statistics, counted how."""

    sources: list[Source]
    processor: Processor
    seq_length: int | None
    title: str

    @property
    def in_words(self) -> bool:
        return isinstance(self.processor, WordCounter)


def main(
    paths: tyro.conf.Positional[tuple[str, ...]],
    out: Path,
    config: Path | None = None,
    llm: str = "",
    image_tokens: int | None = None,
    seq_length: int | None = None,
    format: str = "auto",
    image_dir: str | None = None,
    split: str = "",
    subset: str = "",
    options: str = "",
    title: str = "",
    number_shown: int = 8,
    workers: int | None = None,
) -> None:
    """Describe data sets.

    Args:
        paths: Files, folders, globs, URLs or `hub:OWNER/NAME`, as in `data.sources`; none with --config.
        out: The folder to write.
        config: A recipe's YAML, whose data, tokenizer and visual tokens are used.
        llm: Hub id or folder of the LLM whose tokenizer counts; words are counted without one.
        image_tokens: Visual tokens that an image becomes; 576, as in LLaVA-1.5, where --llm is given.
        seq_length: The row length to compare with the best.
        format: Name of the format; by default the records say what they are.
        image_dir: Folder or zip archive that relative image paths start from.
        split: Which split, of a path that holds several.
        subset: Which part of a data set of the Hub that has several.
        options: The format's other options as YAML, e.g. '{text: {weights: {alt: 1, dense: 2}}}'.
        title: Of the page; the names of the files by default.
        number_shown: Of the longest and of the shortest samples that are shown.
        workers: Processes; as many as there are cores by default, 0 for none beside this one.
    """
    quiet_libraries()
    if bool(paths) == bool(config):
        raise ValueError("give data files or --config, one of them")
    if config:
        asked = of_config(config, seq_length)
    else:
        sources = [source_of(path, format, image_dir, split, subset, options) for path in paths]
        processor = processor_of(llm, image_tokens)
        asked = Asked(sources, processor, seq_length, ", ".join(source.name for source in sources))
    for source in asked.sources:
        print(f"{source.path}: {in_words(source)}")

    workers = cores() if workers is None else workers
    folder = None if asked.in_words else default_folder()
    index = build_index(asked.sources, asked.processor, UNCUT, workers, folder)
    unit, shift = ("words", BEGINNING) if asked.in_words else ("tokens", 0)
    numbers = statistics(index, unit, asked.seq_length, shift)
    shown = examples(index, number_shown, shift)
    for each in (example for told in shown.values() for example in told):
        each["thumbnail"] = thumbnail(index, each.pop("number"))
    written = write_data_report(out, title or asked.title, numbers, shown)
    tell(Console(), numbers, written)


def of_config(path: Path, seq_length: int | None) -> Asked:
    """What a recipe would train on, counted as it would count."""
    from mllm.assembly import build_processor
    from mllm.config import load_config

    run = load_config(path)
    return Asked(run.data.sources, build_processor(run), seq_length or run.data.seq_length, str(path))


def processor_of(llm: str, image_tokens: int | None) -> Processor:
    """The LLM's tokenizer with so many visual tokens an image; a counter of words where there is no LLM."""
    if not llm:
        if image_tokens is not None:
            raise ValueError("--image-tokens needs a tokenizer to compare with: name an LLM with --llm")
        return WordCounter()
    from transformers import AutoTokenizer, CLIPImageProcessor

    from mllm.models.build import named

    with named("tokenizer", llm):
        tokenizer = AutoTokenizer.from_pretrained(llm)
    # no pixels are made here: any image processor will do
    return Processor(tokenizer, CLIPImageProcessor(), LLAVA15 if image_tokens is None else image_tokens)


def tell(console: Console, numbers: dict[str, Any], written: list[Path]) -> None:
    """The headlines, and where the rest is."""
    for number, name, note in headlines(numbers):
        console.print(f"[bold]{number:>12}[/] {name} [dim]{note}[/]", highlight=False)
    console.print(", ".join(map(str, written)), highlight=False, soft_wrap=True)


def door(arguments: list[str] | None = None) -> int:
    """The command; a mistake is one line, not a traceback."""
    return run(main, __doc__, arguments)


if __name__ == "__main__":
    sys.exit(door())
