"""The shards of an index, measured side by side.

Enters: jobs, each a shard or a part of a big one. Leaves: their tables, as they become ready. A table is a function of
its job alone, so the number of workers changes the time and nothing else.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from mllm.data.formats.source import Source
from mllm.data.indexing.measure import measure_shard
from mllm.data.processor import Processor

SMALL = 2**20
"""Bytes in all below which no worker is started: about a thousand conversations, measured within a second."""
PART = 32 * 2**20
"""Bytes of a shard for each worker that shares it: all of them read the whole shard, which is soon done."""
LOOK_SECONDS = 0.2

Bar = AbstractContextManager[Any]


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
    from rich.progress import (
        BarColumn,
        Progress,
        TaskProgressColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    work = Work(sources, processor, max_length)
    alone = workers == 0 or sum(job.bytes // job.parts for job in jobs) < SMALL
    bar: Any = Progress(
        TextColumn("index"),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[lines]:,} samples"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        transient=True,
    )
    task = bar.add_task("", total=sum(job.bytes // job.parts for job in jobs), lines=0)

    def show() -> None:
        bar.update(task, lines=work.lines.value, completed=work.bytes.value)

    shown = bar if progress and jobs else nullcontext()
    yield from one_by_one(work, jobs, shown, show) if alone else side_by_side(work, jobs, workers, shown, show)


class Work:
    """What a worker keeps between jobs, and how far it has come: two counters that the bar looks at."""

    def __init__(self, sources: list[Source], processor: Processor, max_length: int) -> None:
        self.sources, self.processor, self.max_length = sources, processor, max_length
        self.lines: Any = multiprocessing.Value("q", 0)
        self.bytes: Any = multiprocessing.Value("q", 0)

    def __call__(self, job: Job, look: Callable[[], None] = lambda: None) -> pa.Table:
        told = 0

        def tick(lines: int, end: int) -> None:
            nonlocal told
            self.count(lines, end // job.parts - told if end else 0)
            told = end // job.parts if end else told
            look()

        source = self.sources[job.source]
        table = measure_shard(source, job.shard, self.processor, self.max_length, job.part, job.parts, tick)
        self.count(0, job.bytes // job.parts - told)
        return table

    def count(self, lines: int, done: int) -> None:
        for counter, more in ((self.lines, lines), (self.bytes, done)):
            with counter.get_lock():
                counter.value += more


def one_by_one(work: Work, jobs: list[Job], bar: Bar, show: Callable[[], None]) -> Iterator[tuple[Job, pa.Table]]:
    """In this process."""
    with bar:
        for job in jobs:
            yield job, work(job, show)


_work: Work
"""A worker's own, since work that travelled with each job would travel as often as there are jobs."""


def begin(work: Work) -> None:
    global _work
    _work = work
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


def work_on(job: Job) -> pa.Table:
    return _work(job)


def side_by_side(
    work: Work, jobs: list[Job], workers: int, bar: Bar, show: Callable[[], None]
) -> Iterator[tuple[Job, pa.Table]]:
    """In so many processes. They are started before the bar, whose thread must not be copied into them."""
    with ProcessPoolExecutor(min(workers, len(jobs)), initializer=begin, initargs=(work,)) as pool:
        waiting: dict[Future[pa.Table], Job] = {pool.submit(work_on, job): job for job in jobs}
        try:
            with bar:
                while waiting:
                    done, _ = wait(waiting, LOOK_SECONDS, FIRST_COMPLETED)
                    show()
                    for future in done:
                        yield waiting.pop(future), future.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def shard_bytes(path: Path) -> int:
    """What a shard weighs on disk, a folder with all that lies in it."""
    if path.is_dir():
        return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    return path.stat().st_size
