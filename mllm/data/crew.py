"""Jobs done side by side in processes, under one progress bar.

Enters: what is done with a job, the jobs, a number of workers. Leaves: each job's number with its result, as they
become ready. A result must hang on its job alone, so that the number of workers changes the time and nothing else.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import connection
from typing import Any, TypeVar

Job = TypeVar("Job")
Result = TypeVar("Result")
Tick = Callable[[int, int], None]
"""Told how far the bar moves on, and how many things are new behind it."""
Work = Callable[[Job, Tick], Result]
LOOK_SECONDS = 0.2


def cores() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run_jobs(
    work: Work[Job, Result],
    jobs: Sequence[Job],
    workers: int,
    label: str,
    total: int,
    things: str,
    progress: bool = True,
) -> Iterator[tuple[int, Result]]:
    """Yield the number and the result of each job; without workers, in this process and in order.

    Raises:
        ValueError: a worker was killed.
    """
    tally = Tally(work)
    bar = progress_bar(label, things, progress)
    task = bar.add_task("", total=total or None, things=0)

    def show() -> None:
        bar.update(task, completed=tally.done.value, things=tally.things.value)

    if workers and jobs:
        yield from side_by_side(tally, jobs, min(workers, len(jobs)), bar, show)
        return
    with bar:
        for number, job in enumerate(jobs):
            yield number, tally(job, show)


def progress_bar(label: str, things: str, progress: bool = True) -> Any:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        Progress,
        TaskProgressColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    seen = progress and Console().is_terminal
    counted = TextColumn(f"{{task.fields[things]:,}} {things}")
    times = TimeElapsedColumn(), TimeRemainingColumn()
    return Progress(
        TextColumn(label), BarColumn(), TaskProgressColumn(), counted, *times, transient=True, disable=not seen
    )


class Tally:
    """The work with two counters of how far it has come, shared by all who do it."""

    def __init__(self, work: Work[Any, Any]) -> None:
        self.work = work
        self.done: Any = multiprocessing.Value("q", 0)
        self.things: Any = multiprocessing.Value("q", 0)

    def __call__(self, job: Any, look: Callable[[], None] = lambda: None) -> Any:
        def tick(done: int, things: int) -> None:
            for counter, more in ((self.done, done), (self.things, things)):
                with counter.get_lock():
                    counter.value += more
            look()

        return self.work(job, tick)


class Walk:
    """A way through the bytes of a file as ticks; of one walked by `parts` workers at once, each ticks its share."""

    def __init__(self, tick: Tick, size: int, parts: int = 1) -> None:
        self.tick, self.share, self.parts = tick, size // parts, parts
        self.told = 0

    def at(self, end: int, things: int) -> None:
        """The file is read up to this byte (0 where records are numbered), and so many things are new."""
        reached = min(max(end // self.parts, self.told), self.share)
        self.tick(reached - self.told, things)
        self.told = reached

    def finish(self) -> None:
        self.at(self.share * self.parts, 0)


_tally: Tally
"""A worker's own, since work that travelled with each job would travel as often as there are jobs."""


def begin(tally: Tally) -> None:
    """A worker starts: Ctrl-C ends it without a word, and so does the end of the process that started it."""
    global _tally
    _tally = tally
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    threading.Thread(target=end_with_parent, daemon=True).start()


def end_with_parent() -> None:
    """A run that was killed leaves nobody behind who still writes."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    os._exit(1)


def work_on(job: Any) -> Any:
    return _tally(job)


def side_by_side(
    tally: Tally, jobs: Sequence[Any], workers: int, bar: Any, show: Callable[[], None]
) -> Iterator[tuple[int, Any]]:
    """In so many processes. They are started before the bar, whose thread must not be copied into them."""
    with ProcessPoolExecutor(workers, initializer=begin, initargs=(tally,)) as pool:
        try:
            waiting: dict[Future[Any], int] = {pool.submit(work_on, job): number for number, job in enumerate(jobs)}
            with bar:
                while waiting:
                    done, _ = wait(waiting, LOOK_SECONDS, FIRST_COMPLETED)
                    show()
                    for future in done:
                        yield waiting.pop(future), future.result()
        except BrokenProcessPool as error:
            raise ValueError(
                "a worker was killed, perhaps because memory ran out: run the same command again with fewer workers "
                "(--workers of a data script, --data.num_workers of a run)"
            ) from error
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
