"""A run that waits says for whom, and one that waits in vain ends.

Enters: a beat of every rank at each phase of a step (step, phase, micro-batch, sample ids). Leaves: where a rank stands
still while others wait for it, one line with its number, its step and its samples (`watching/alarm.py`); after a longer
time, or where a rank stops with an error (`watching/stops.py`), the end of all ranks, with that rank's words.

Beats travel through the key-value store by which the ranks found each other (`watching/store.py`). A thread of each
rank writes a pulse beside them, so that a process that was stopped is told from one that works for long. Nobody reads
the others' beats as long as everything moves.
"""

from __future__ import annotations

import itertools
import json
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

from mllm.train.watching.alarm import Alarm
from mllm.train.watching.stack import where
from mllm.train.watching.stops import RankStopped, Stops
from mllm.train.watching.store import connection, put
from mllm.train.watching.waits import Seen, Standing, suspects

if TYPE_CHECKING:
    from accelerate import Accelerator

    from mllm.types import Batch

T = TypeVar("T")
PULSE_SECONDS = 1.0
SHOWN_IDS = 50
_runs = itertools.count()
"""Numbers the runs of a process, alike on every rank: keys of an earlier one mean nothing."""


class Watchdog:
    """A context around the steps of a run, on every rank. `seconds` without a beat are told (0 watches nothing), after
    `stop_seconds` the run ends. Where a run `compiles`, every phase of its first step may last."""

    def __init__(
        self, accelerator: Accelerator, folder: Path, seconds: float, stop_seconds: float, compiles: bool = False
    ) -> None:
        self.rank, self.world_size = accelerator.process_index, accelerator.num_processes
        self.seconds = seconds
        self.tick = min(PULSE_SECONDS, max(seconds, 1.0) / 10)
        self.quiet = max(3 * self.tick, seconds / 4)
        self.accelerator, number = accelerator, next(_runs)
        self.beats, self.pulses = (connection(self.world_size, number) for _ in range(2))
        self.standing = Standing(rank=self.rank)
        self.seen: dict[int, Seen] = {}
        self.answered = self.moved = time.monotonic()
        self.compiles = compiles
        self.ahead: deque[list[str]] = deque()
        """Sample ids of the micro-batches that were asked for and did not come yet."""
        self.main = threading.get_ident()
        self.over = threading.Event()
        self.stops = Stops(self.rank, self.world_size, self.pulses, self.over)
        self.alarm = Alarm(self.rank, self.world_size, folder, stop_seconds, self.quiet, 2 * self.tick)

    # ------------------------------------------------------------ the thread that trains

    def __enter__(self) -> Watchdog:
        if self.seconds:
            self.stand(phase="starting", slow=True)
            self.pulse(0)  # by this thread: whoever stands still from here on is known to the others
            self.threads = [threading.Thread(target=work, daemon=True) for work in (self.exchange, self.watch)]
            for thread in self.threads:
                thread.start()
        return self

    def beat(self, phase: str, batch: Batch | None = None, slow: bool = False) -> None:
        """A phase begins; `batch` is what it works on, `slow` that it may last."""
        ids = self.standing.ids if batch is None else tuple(id for row in batch["sample_ids"] for id in row)
        self.stand(phase=phase, ids=ids[:SHOWN_IDS], slow=slow or self.compiles)

    def stand(self, **changes: Any) -> None:
        self.moved = time.monotonic()
        self.standing = self.standing.next(**changes)
        if self.seconds and self.world_size > 1:
            put(self.beats, f"beat/{self.rank}", self.standing.text())

    def asked(self, items: Iterable[T], names: Callable[[T], Iterable[str]]) -> Iterator[T]:
        """The rows of each micro-batch as the loader asks for them: whose samples will be waited for."""
        for item in items:
            self.ahead.append(list(itertools.islice(names(item), SHOWN_IDS)))
            if len(self.ahead) == 1 and self.standing.phase == "loading":
                self.stand(ids=tuple(self.ahead[0]))
            yield item

    def loaded(self, batches: Iterator[T], first_step: int, accumulation: int) -> Iterator[T]:
        """The same batches, each waited for under watch."""
        for number in itertools.count():
            step, micro_batch = first_step + number // accumulation + 1, number % accumulation
            first = number < accumulation  # which fills the loader
            self.compiles = self.compiles and first
            ids = tuple(self.ahead[0]) if self.ahead else ()
            self.stand(step=step, phase="loading", micro_batch=micro_batch, ids=ids, slow=first)
            batch = next(batches, None)
            if batch is None:
                return
            if self.ahead:
                self.ahead.popleft()
            yield batch

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self.seconds:
            return
        try:
            if error is None:
                self.beat("ending", slow=True)
                self.accelerator.wait_for_everyone()
            elif isinstance(error, Exception):
                self.stops.leave(error, self.standing.step)
        except RuntimeError as late:
            if not isinstance(late, RankStopped):
                self.stops.leave(late, self.standing.step)
            raise
        finally:
            self.over.set()
            for thread in self.threads:
                thread.join(timeout=2 * self.tick)

    # ------------------------------------------------------------ the thread that talks to the store

    def exchange(self) -> None:
        """Write the pulse, read what the others wrote; stands still where the store does."""
        for number in itertools.count(1):
            if self.over.wait(self.tick):
                return
            try:
                age = self.pulse(number)
                if self.world_size > 1:
                    self.stops.hear()
                    # the first rank may hold the store: what it did last must be known when it falls silent
                    self.look(range(self.world_size) if age > self.seconds / 2 else [0])
                self.answered = time.monotonic()
            except Exception:
                time.sleep(self.tick)  # whoever held the store is gone: the exchange of gradients will say so as well

    def pulse(self, number: int) -> float:
        """Write that this process is alive, and for how long it has stood in the same phase."""
        age = time.monotonic() - self.moved
        at, exchanging = where(self.main) if age > 2 * self.tick else ("", False)
        pulse = {"number": number, "age": round(age, 1), "at": at, "exchanging": exchanging}
        self.note(self.rank, self.standing, pulse)
        if self.world_size > 1:
            self.pulses.set(f"pulse/{self.rank}", json.dumps(pulse))
        return age

    def look(self, ranks: Iterable[int]) -> None:
        """Read the beats and pulses of some ranks."""
        begun = [rank for rank in ranks if rank != self.rank and self.pulses.check([f"beat/{rank}", f"pulse/{rank}"])]
        if begun:
            texts = iter(self.pulses.multi_get([f"{kind}/{rank}" for rank in begun for kind in ("beat", "pulse")]))
            for rank in begun:
                self.note(rank, Standing.read(rank, next(texts)), json.loads(next(texts)))

    def note(self, rank: int, standing: Standing, pulse: dict[str, Any]) -> None:
        """What is known of a rank now; a pulse that moved was heard now."""
        known, now = self.seen.get(rank), time.monotonic()
        heard = known.heard if known and known.number == pulse["number"] else now
        self.seen = {**self.seen, rank: Seen(standing=standing, heard=heard, **pulse)}

    # ------------------------------------------------------------ the thread that judges

    def watch(self) -> None:
        """Compare what is known; touches no store, so that it never stands still itself."""
        while not self.over.wait(self.tick):
            age = time.monotonic() - self.moved
            if self.stops.error is not None:
                self.stops.follow()
            elif age > self.seconds:
                now = time.monotonic()
                self.alarm.sound(self.standing, age, self.waited_for(now), now)
            else:
                self.alarm.rest()

    def waited_for(self, now: float) -> list[Seen]:
        """The ranks for whom this one waits, as far as it knows."""
        seen = dict(self.seen)
        if self.world_size > 1 and now - self.answered > self.quiet:
            # the store's own machine or process stands still
            return [seen[0]] if self.rank and 0 in seen else []
        return suspects(list(seen.values()), now, self.seconds, self.quiet)
