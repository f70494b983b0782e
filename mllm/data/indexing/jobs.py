"""The shards of an index, measured side by side.

Enters: jobs, each a shard or a part of a big one. Leaves: their tables, as they become ready. A table is a function of
its job alone, so the number of workers changes the time and nothing else.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from mllm.data import crew
from mllm.data.formats.source import Source
from mllm.data.indexing.measure import measure_shard
from mllm.data.processor import Processor

SMALL = 2**20
"""Bytes in all below which no worker is started: about a thousand conversations, measured within a second."""
PART = 32 * 2**20
"""Bytes of a shard for each worker that shares it: all of them read the whole shard, which is soon done."""


@dataclass(frozen=True)
class Job:
    """One shard, or one of the parts that several workers make of it."""

    source: int
    shard: int
    bytes: int
    part: int = 0
    parts: int = 1


def cut_jobs(shards: list[tuple[int, int, int]], workers: int) -> list[Job]:
    """Jobs of (source, shard, bytes), the longest first; big shards in parts where there are more workers than
    shards."""
    spare = max(1, workers // max(1, len(shards)))
    jobs = []
    for source, shard, size in shards:
        parts = min(spare, max(1, -(-size // PART)))
        jobs += [Job(source, shard, size, part, parts) for part in range(parts)]
    return sorted(jobs, key=lambda job: -job.bytes // job.parts)


def run_jobs(
    jobs: list[Job], sources: list[Source], processor: Processor, max_length: int, workers: int, progress: bool
) -> Iterator[tuple[Job, pa.Table]]:
    """Each job with its table, in the order in which they are done."""
    total = sum(job.bytes // job.parts for job in jobs)
    work = Measuring(sources, processor, max_length)
    crew_size = workers if total >= SMALL else 0
    for number, table in crew.run_jobs(work, jobs, crew_size, "index", total, "samples", progress and bool(jobs)):
        yield jobs[number], table


@dataclass(frozen=True)
class Measuring:
    """What a worker keeps between jobs."""

    sources: list[Source]
    processor: Processor
    max_length: int

    def __call__(self, job: Job, tick: crew.Tick) -> pa.Table:
        if multiprocessing.parent_process():  # in a worker, whose own threads would fight with the other workers
            os.environ["TOKENIZERS_PARALLELISM"] = "false"
        walk = crew.Walk(tick, job.bytes, job.parts)
        table = measure_shard(
            self.sources[job.source],
            job.shard,
            self.processor,
            self.max_length,
            job.part,
            job.parts,
            lambda lines, end: walk.at(end, lines),
        )
        walk.finish()
        return table


def shard_bytes(path: Path) -> int:
    """What a shard weighs on disk, a folder with all that lies in it."""
    if path.is_dir():
        return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    return path.stat().st_size
