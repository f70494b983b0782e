"""Any source to tar shards: which record goes into which, and each shard written once.

Enters: a source, `Settings`, a folder. Leaves: `00000.tar`, `00001.tar`, ... with `00000_stats.json` beside each, and
`quarantine.jsonl` where records could not be written. A shard hangs on the source and the settings alone, down to its
bytes; it appears whole or not at all, its stats after it, so that a run that was stopped goes on where it stood.
"""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np

from mllm.data.crew import Tick, run_jobs
from mllm.data.curation.record_list import RECORD, RecordList
from mllm.data.curation.shards.members import Layout, Member, Pictures, layout_of, members_of
from mllm.data.formats.source import Place, Source
from mllm.types import Sample

LEAST_DIGITS = 4
"""Of a record's number in its shard, behind the five of the shard, as img2dataset names them."""

WORDS = ("txt", "json")
"""Parts that are no images."""

Stats = dict[str, Any]


@dataclass(frozen=True)
class Settings:
    """What the bytes of the shards hang on, beside the source."""

    samples_per_shard: int = 10_000
    max_side: int | None = None
    decode: bool = True


def write_shards(records: RecordList, source: Source, settings: Settings, out: Path, workers: int) -> list[Stats]:
    """Write the shards that are not there yet; the stats of all of them, in order.

    Raises:
        ValueError: a worker was killed.
        OSError: the folder cannot be written.
    """
    stats = {number: read_stats(out, number) for number in range(num_shards(records, settings))}
    missing = [number for number, found in stats.items() if found is None]
    work = Writer(source, settings, layout_of(source), records.places, out)
    total = sum(min(settings.samples_per_shard, len(records) - n * settings.samples_per_shard) for n in missing)
    for place, found in run_jobs(work, missing, workers, "shards", total, "images"):
        stats[missing[place]] = found
    return [found for found in stats.values() if found is not None]


def num_shards(records: RecordList, settings: Settings) -> int:
    return -(-len(records) // settings.samples_per_shard)


@dataclass
class Writer:
    """Writes one shard after the other."""

    source: Source
    settings: Settings
    layout: Layout
    places: np.ndarray
    """[places, 6] int64, as in a `RecordList`."""
    out: Path

    def __call__(self, number: int, tick: Tick) -> Stats:
        """Write a shard and then its stats; of one without a single good record the stats alone, unseen by readers."""
        stats: Stats = {"records": 0, "samples": 0, "images": 0, "bytes": 0, "faults": []}
        unfinished = beside(tar_path(self.out, number))
        with tarfile.open(unfinished, "w", format=tarfile.USTAR_FORMAT) as archive:
            for key, members, samples in self.records(number, stats["faults"]):
                for part, data in members:
                    add(archive, f"{key}.{part}", data)
                images = sum(part not in WORDS for part, _ in members)
                for name, more in (("records", 1), ("samples", samples), ("images", images)):
                    stats[name] += more
                tick(1, images)
        if stats["records"]:
            stats["bytes"] = unfinished.stat().st_size
            unfinished.replace(tar_path(self.out, number))
        else:
            unfinished.unlink()
        write_whole(stats_path(self.out, number, hidden=not stats["records"]), json.dumps(stats, indent=1).encode())
        return stats

    def records(self, number: int, faults: list[Stats]) -> Iterator[tuple[str, list[Member], int]]:
        """Yield (key, members, number of samples) of each good record; append the others to `faults`."""
        pictures = Pictures(self.settings.max_side, self.settings.decode)
        digits = max(LEAST_DIGITS, len(str(self.settings.samples_per_shard - 1)))
        for record, rows in groupby(self.rows(number).tolist(), itemgetter(RECORD)):
            places = list(rows)
            samples: list[Sample] = []
            try:
                for shard, start, size, row, parts, _ in places:
                    samples += [self.source.fetch(Place(shard, start, size, row, part)) for part in range(parts)]
                members = members_of(samples, self.layout, pictures)
            except ValueError as error:
                faults += fault_lines(self.source, [(shard, row) for shard, _, _, row, _, _ in places], error, samples)
            else:
                yield f"{number:05d}{record % self.settings.samples_per_shard:0{digits}d}", members, len(samples)

    def rows(self, number: int) -> np.ndarray:
        """The places of a shard's records."""
        first = number * self.settings.samples_per_shard
        ends = np.searchsorted(self.places[:, RECORD], [first, first + self.settings.samples_per_shard])
        return self.places[ends[0] : ends[1]]


def add(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    """A member that tells of nothing but its name and its content: no time, no owner."""
    member = tarfile.TarInfo(name)
    member.size = len(data)
    archive.addfile(member, io.BytesIO(data))


def fault_lines(
    source: Source, rows: list[tuple[int, int]], error: ValueError, samples: list[Sample]
) -> list[dict[str, Any]]:
    """Lines of `quarantine.jsonl` for the rows (of shards) that make up one record."""
    cause = str(error)
    for shard, row in rows:
        cause = cause.removeprefix(f"{source.origin(shard, row).where}: ")
    about = {"kind": "image" if cause.startswith("cannot read image") else "record", "cause": cause}
    ids = {sample.where: sample.id for sample in reversed(samples)}
    return [
        {"id": ids.get(source.origin(shard, row).where, ""), "file": source.files()[shard].name, "row": row, **about}
        for shard, row in rows
    ]


def read_stats(out: Path, number: int) -> Stats | None:
    """The stats of a finished shard; None where it must be written."""
    for hidden in (False, True):
        path = stats_path(out, number, hidden)
        if path.is_file():
            stats: Stats = json.loads(path.read_text())
            tar = tar_path(out, number)
            found = tar.stat().st_size if tar.is_file() else 0
            if found == stats["bytes"]:
                return stats
    return None


def tar_path(out: Path, number: int) -> Path:
    return out / f"{number:05d}.tar"


def stats_path(out: Path, number: int, hidden: bool) -> Path:
    """Readers of folders skip stats beside a tar of their name, and what is hidden."""
    return out / f"{'.' if hidden else ''}{number:05d}_stats.json"


def beside(path: Path) -> Path:
    """Where a file is written before it takes its name."""
    return path.with_name(f".{path.name.lstrip('.')}.tmp")


def write_whole(path: Path, data: bytes) -> None:
    """The file appears whole or not at all."""
    beside(path).write_bytes(data)
    os.replace(beside(path), path)


def total(stats: list[Stats]) -> Counter[str]:
    """Sums over shards."""
    return Counter({key: sum(one[key] for one in stats) for key in ("records", "samples", "images", "bytes")})
