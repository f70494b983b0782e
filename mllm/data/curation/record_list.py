"""What a source holds before anything is copied: where each record lies, and which cannot be read.

Enters: a source. Leaves: a `RecordList`, six whole numbers a place, found by one pass over all shards side by side.
COCO's annotations of one image make one record, so that nobody writes each of its images five times.
"""

from __future__ import annotations

from array import array
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mllm.data.crew import Tick, Walk, run_jobs
from mllm.data.formats.coco import CocoSource
from mllm.data.formats.source import Filtered, Place, Source
from mllm.types import Sample

COLUMNS = 6
RECORD = 5
"""The column by which places are sorted."""
BLOCK = 256
"""Places between two looks of the progress bar."""


@dataclass
class RecordList:
    """The good records of a source in order, and the others."""

    places: np.ndarray
    """[places, 6] int64: shard, start and size in it, row, number of samples there, number of the record."""
    samples: int = 0
    """A caption is one, and so is a chat."""
    faults: list[dict[str, Any]] = field(default_factory=list)
    """Records that cannot be read: id, file, row, kind and cause of each."""
    filtered: dict[str, int] = field(default_factory=dict)
    """How often records were left out because the source was told to, by reason."""

    def __len__(self) -> int:
        """Number of good records."""
        return int(self.places[-1, RECORD]) + 1 if len(self.places) else 0


def list_records(source: Source, workers: int) -> RecordList:
    """Read every record once.

    Raises:
        ValueError: a file as a whole is broken.
    """
    shards = range(len(source.files()))
    size = sum(file.path.stat().st_size for file in source.files())
    found = dict(run_jobs(Lister(source), shards, workers, "reading", size, "records"))
    return joined([found[shard] for shard in shards])


@dataclass
class Lister:
    """Lists the records of one shard after the other."""

    source: Source

    def __call__(self, shard: int, tick: Tick) -> RecordList:
        found, filtered = RecordList(np.empty((0, COLUMNS), np.int64)), Counter[str]()
        numbers, records = array("q"), dict[Any, int]()
        walk = Walk(tick, self.source.files()[shard].path.stat().st_size)
        for count, (place, item) in enumerate(self.source.scan(shard), 1):
            if count % BLOCK == 0:
                walk.at(place.start + place.size if place.size else 0, BLOCK)
            if isinstance(item, Filtered):
                filtered[self.cause(place, item)] += 1
            elif not isinstance(item, Sample):
                line = {"id": "", "file": self.source.files()[shard].name, "row": place.row, "kind": "record"}
                found.faults.append({**line, "cause": self.cause(place, item)})
            else:
                found.samples += 1
                if place.part:
                    numbers[4 - COLUMNS] += 1
                    continue
                record = len(numbers) // COLUMNS
                if isinstance(self.source, CocoSource):
                    record = records.setdefault(item.images[0], len(records))
                numbers.extend((shard, place.start, place.size, place.row, 1, record))
        walk.finish()
        places = np.frombuffer(numbers, np.int64).reshape(-1, COLUMNS)
        found.places = places[np.argsort(places[:, RECORD], kind="stable")]
        found.filtered = dict(filtered)
        return found

    def cause(self, place: Place, error: ValueError) -> str:
        return str(error).removeprefix(f"{self.source.origin(place.shard, place.row).where}: ")


def joined(parts: list[RecordList]) -> RecordList:
    """The lists of the shards as one, its records numbered through."""
    before = 0
    for part in parts:
        records = len(part)
        part.places[:, RECORD] += before
        before += records
    counts: Counter[str] = sum((Counter(part.filtered) for part in parts), Counter())
    return RecordList(
        np.concatenate([part.places for part in parts]),
        sum(part.samples for part in parts),
        [fault for part in parts for fault in part.faults],
        dict(counts),
    )
