"""What was measured so far, so that a run that was stopped goes on and other thresholds measure nothing again.

Enters: a folder and the facts that its measurements hang on. Leaves: `places.npy`, where each record lies, and a line
of JSON for each block in a file of each rank; a line that was cut off by the end of a run is no line. Kinds of
measurement may be added later: a block's lines are put together from all that was measured of it.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import TypeAdapter

from mllm.data.curation.filters.measure import Line
from mllm.data.curation.record_list import list_records
from mllm.data.formats.source import Source

BLOCK = 64
"""Records of a block, which a model scores together; more or fewer may change the last digit."""
VERSION = 1
"""Raise it where a score is computed in another way."""
OURS = re.compile(r"facts\.json|places\.npy|rank\d+\.jsonl")
Facts = dict[str, Any]


@dataclass
class Store:
    """One folder of measurements."""

    folder: Path
    places: np.ndarray
    """[P, 5] int64 in the order of the source: shard, start and size in it, row, number of samples there."""
    faults: list[dict[str, Any]]
    """Records that cannot be read: file, row and cause of each."""
    filtered: dict[str, int]
    """Records that the source was told to leave out, by reason."""
    found: dict[int, list[tuple[frozenset[str], Path, int, int]]] = field(default_factory=lambda: defaultdict(list))
    """Of each block the kinds, file, place and size of each of its lines."""

    def __post_init__(self) -> None:
        for path in sorted(self.folder.glob("rank*.jsonl")):
            for kinds, number, start, size in lines_of(path):
                self.found[number].append((kinds, path, start, size))

    def __len__(self) -> int:
        """Blocks."""
        return -(-len(self.places) // BLOCK)

    def missing(self, kinds: Iterable[str]) -> dict[tuple[str, ...], list[int]]:
        """Kinds that are not measured yet, and the blocks that lack just these."""
        wanted, found = frozenset(kinds), defaultdict(list)
        for number in range(len(self)):
            if lacking := wanted - self.known(number):
                found[tuple(sorted(lacking))].append(number)
        return dict(found)

    def known(self, number: int) -> frozenset[str]:
        return frozenset().union(*(kinds for kinds, *_ in self.found.get(number, ())))

    def lines(self, kinds: Iterable[str]) -> Iterator[Line]:
        """The lines of all samples in order, with the scores of these kinds."""
        wanted = frozenset(kinds)
        for number in range(len(self)):
            lines: list[Line] = []
            for known, path, start, size in self.found[number]:
                if not known & wanted:
                    continue
                with path.open("rb") as file:
                    file.seek(start)
                    read = json.loads(file.read(size))["lines"]
                lines = [{**old, **new} for old, new in zip(lines or [{}] * len(read), read, strict=True)]
            yield from lines


def lines_of(path: Path) -> Iterator[tuple[frozenset[str], int, int, int]]:
    """Yield (kinds, block, start, size) of the whole lines of a file."""
    start = 0
    with path.open("rb") as file:
        for text in file:
            if text.endswith(b"\n"):
                head = json.loads(text[: text.index(b"]") + 1] + b"}")
                yield frozenset(head["kinds"]), head["block"], start, len(text)
            start += len(text)


class Writer:
    """Adds blocks to the file of one rank."""

    def __init__(self, folder: Path, rank: int) -> None:
        path = folder / f"rank{rank}.jsonl"
        cut_off(path)
        self.file = path.open("ab")

    def add(self, number: int, kinds: Iterable[str], lines: list[Line]) -> None:
        """`kinds` must come before the lines: a reader finds them without reading on."""
        head = {"block": number, "kinds": sorted(kinds), "lines": lines}
        self.file.write(json.dumps(head).encode() + b"\n")
        self.file.flush()


def cut_off(path: Path) -> None:
    """Remove what a run that was killed left behind the last whole line."""
    if path.is_file():
        with path.open("rb+") as file:
            end = max((start + size for _, _, start, size in lines_of(path)), default=0)
            file.truncate(end)


def open_store(folder: Path, source: Source, workers: int, overwrite: bool) -> None:
    """Make the folder ready: its measurements are of this source, or it is new and the records are listed now.

    Raises:
        ValueError: it holds measurements of something else.
    """
    facts = facts_of(source)
    path = folder / "facts.json"
    if path.is_file() and not overwrite:
        told = json.loads(path.read_text())["facts"]
        if told == facts:
            return
        changed = ", ".join(name for name in facts if told.get(name) != facts[name])
        raise ValueError(
            f"{folder} holds scores of something else (not the same: {changed}): name another folder with --out, or "
            f"measure anew with --overwrite"
        )
    remove(folder)
    records = list_records(source, workers)
    order = np.lexsort((records.places[:, 3], records.places[:, 0]))  # it lists COCO's captions by image
    np.save(folder / "places.npy", records.places[order, :5])
    path.write_text(json.dumps({"facts": facts, "faults": records.faults, "filtered": records.filtered}))


def remove(folder: Path) -> None:
    """Empty the folder of measurements, and of nothing else."""
    folder.mkdir(parents=True, exist_ok=True)
    foreign = sorted(path.name for path in folder.iterdir() if not OURS.fullmatch(path.name))
    if foreign:
        raise ValueError(f"{folder} holds other files ({', '.join(foreign)[:200]}): name another folder with --out")
    for path in folder.iterdir():
        path.unlink()


def load_store(folder: Path) -> Store:
    """What `open_store` made ready."""
    told = json.loads((folder / "facts.json").read_text())
    return Store(folder, np.load(folder / "places.npy"), told["faults"], told["filtered"])


def facts_of(source: Source) -> Facts:
    """What measurements hang on: the source's settings and its files as they lie there."""
    files = [(file.path, file.path.stat()) for file in source.files()]
    return {
        "version": VERSION,
        "block": BLOCK,
        "source": TypeAdapter(type(source)).dump_python(source, mode="json"),
        "files": [[str(path.resolve()), state.st_size, state.st_mtime_ns] for path, state in files],
    }
