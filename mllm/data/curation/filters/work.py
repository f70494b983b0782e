"""Measuring, shared by ranks and their workers.

Enters: a source, what is wanted of its samples, perhaps a model that scores images with words. Leaves: a `Store` in
which all of it is known. Workers decode, the rank's own process scores; blocks are dealt to the ranks in turn. What is
known already is not measured again, whoever measured it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from mllm.data.crew import progress_bar
from mllm.data.curation.filters.measure import LOOK, SIZE, TEXT, Block, Blocks, Line, See
from mllm.data.curation.filters.rules import SIZES, Rules
from mllm.data.curation.filters.store import BLOCK, Store, Writer, load_store
from mllm.data.formats.source import Source

if TYPE_CHECKING:
    from torch import Tensor


DIGITS = 6
"""Of a score."""


class Scorer(Protocol):
    """A model that says how well words fit an image."""

    see: See

    @property
    def kind(self) -> str:
        """What its scores are kept under."""
        ...

    def __call__(self, seen: Sequence[Mapping[str, Tensor]], texts: Sequence[str]) -> list[float]:
        """The score of each image and its words."""
        ...


class Ranks(Protocol):
    """Who else works: what `accelerate.PartialState` tells."""

    process_index: int
    num_processes: int

    @property
    def is_main_process(self) -> bool:
        """Whether this is the one that speaks."""
        ...

    def wait_for_everyone(self) -> None:
        """Go on when all have come this far."""
        ...


def measure(ranks: Ranks, source: Source, folder: Path, kinds: list[str], scorer: Scorer | None, workers: int) -> Store:
    """All that is wanted of all blocks; the folder is ready (`open_store`)."""
    store = load_store(folder)
    ranks.wait_for_everyone()  # nobody writes before all have read
    writer = Writer(folder, ranks.process_index)
    for lacking, numbers in store.missing(kinds).items():
        model = scorer if scorer and scorer.kind in lacking else None
        blocks = Blocks(source, store.places, BLOCK, lacking, model.see if model else None)
        mine = numbers[ranks.process_index :: ranks.num_processes]
        for block in measured(blocks, mine, workers, ranks.is_main_process):
            if model and block.seen:
                add_scores(block, model)
            writer.add(block.number, lacking, block.lines)
    ranks.wait_for_everyone()
    return load_store(folder)


def measured(blocks: Blocks, numbers: list[int], workers: int, shown: bool) -> Iterator[Block]:
    """Yield the blocks of those numbers, decoded in workers, under a bar."""
    from torch.utils.data import DataLoader

    options: dict[str, Any] = {"num_workers": min(workers, len(numbers))} if workers else {}
    loader = DataLoader(blocks, batch_size=None, sampler=numbers, collate_fn=as_it_is, **options)
    waiting = iter(loader)  # workers start before the bar, whose thread must not be copied into them
    bar = progress_bar("measuring", "samples")
    bar.disable = not shown
    task, samples = bar.add_task("", total=len(numbers), things=0), 0
    with bar:
        for block in waiting:
            yield block
            samples += len(block.lines)
            bar.update(task, advance=1, things=samples)


def as_it_is(block: Any) -> Any:
    return block


def add_scores(block: Block, scorer: Scorer) -> None:
    """To each sample with images the mean of their scores."""
    found: dict[int, list[float]] = {}
    for owner, score in zip(block.owners, scorer(block.seen, block.texts), strict=True):
        found.setdefault(owner, []).append(score)
    for owner, each in found.items():
        block.lines[owner][scorer.kind] = round(sum(each) / len(each), DIGITS)


def kinds_for(rules: Rules, benchmark: bool, scorer: Scorer | None) -> list[str]:
    """What must be measured for those rules."""
    kinds = [TEXT]
    if any(getattr(rules, name) is not None for name in SIZES):
        kinds.append(SIZE)
    if benchmark or rules.duplicates is not None:
        kinds.append(LOOK)
    return kinds + ([scorer.kind] if scorer else [])


def lines_of(store: Store, kinds: list[str], scorer: Scorer | None) -> Iterator[Line]:
    """The lines of all samples, the model's score under the name that rules have for it."""
    for line in store.lines(kinds):
        if scorer:
            line["clip"] = line.pop(scorer.kind, None)
        yield line
