"""A run that waits says for whom, and one that waits in vain ends.

Enters: a beat of every rank at each phase of a step (step, phase, micro-batch, sample ids). Leaves: where a rank stands
still while others wait for it, one line with its number, its step and its samples, on the screen and in `hang.jsonl`;
after a longer time, or where a rank stops with an error, the end of all ranks, with that rank's words.

Beats travel through the key-value store by which the ranks found each other, over connections of their own: it does
not need the exchange that hangs. A thread of each rank writes a pulse beside them, so that a process that was stopped
is told from one that works for long. Nobody reads the others' beats as long as everything moves.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from mllm.train.watching.waits import Seen, Standing, sentence, suspects

if TYPE_CHECKING:
    from accelerate import Accelerator

    from mllm.types import Batch

T = TypeVar("T")
EXIT_CODE = 3
"""Of a run that was ended because a rank stood still."""
PULSE_SECONDS = 1.0
GRACE_SECONDS = 5.0
"""How long ranks have to stop by themselves once one of them has stopped with an error; then they are stopped."""
MOMENT_SECONDS = 0.5
"""How far apart ranks run into an error that is the same for all."""
SHOWN_IDS = 50
_runs = itertools.count()
"""Numbers the runs of a process, alike on every rank: keys of an earlier one mean nothing."""


class RankStopped(RuntimeError):
    """Another rank ended the run, and it is said; `code` is what this process exits with."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


class Watchdog:
    """A context around the steps of a run, on every rank. `seconds` without a beat are told (0 watches nothing), after
    `stop_seconds` the run ends."""

    def __init__(self, accelerator: Accelerator, folder: Path, seconds: float, stop_seconds: float) -> None:
        self.rank, self.world_size = accelerator.process_index, accelerator.num_processes
        self.folder, self.seconds, self.stop_seconds = folder, seconds, stop_seconds
        self.tick = min(PULSE_SECONDS, max(seconds, 1.0) / 10)
        self.accelerator, number = accelerator, next(_runs)
        self.beats, self.pulses = (connection(self.world_size, number) for _ in range(2))
        self.standing = Standing(rank=self.rank)
        self.seen: dict[int, Seen] = {}
        self.answered = self.moved = time.monotonic()
        self.ahead: deque[list[str]] = deque()
        """Sample ids of the micro-batches that were asked for and did not come yet."""
        self.main = threading.get_ident()
        self.over = threading.Event()
        self.leaving = False
        self.error: dict[str, Any] | None = None
        """What another rank stopped with."""
        self.told: tuple[int, ...] = ()

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
        self.stand(phase=phase, ids=ids[:SHOWN_IDS], slow=slow)

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
            # the first step also compiles, and fills the loader
            first = number < accumulation
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
                self.leave(error)
        except RuntimeError as late:
            if not isinstance(late, RankStopped):
                self.leave(late)
            raise
        finally:
            self.over.set()
            for thread in self.threads:
                thread.join(timeout=2 * self.tick)

    def leave(self, error: Exception) -> None:
        """Tell the others why this rank stops, or learn that another one was first.

        Raises:
            RankStopped: it was another one.
        """
        self.leaving = True
        if self.world_size == 1:
            return
        mine = {
            "rank": self.rank,
            "step": self.standing.step,
            "message": str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}",
            "code": 2 if isinstance(error, ValueError) else 1,
        }
        first = self.first_error(mine)
        if first is None or first["message"] == mine["message"]:
            # one that all ranks meet is said by the first of them
            error.silent = first is not None and first["rank"] != self.rank  # type: ignore[attr-defined]
            put(self.pulses, f"knows/{self.rank}", "1")
            return
        self.learn(first)
        put(self.pulses, f"knows/{self.rank}", "1")
        raise RankStopped(stopped(first), first["code"]) from None

    def first_error(self, mine: dict[str, Any]) -> dict[str, Any] | None:
        """The error that ends the run, this rank's if no other came before; None where nobody can be asked. Whoever
        came first waits until all others know, since they may lose the store with it."""
        answer: list[dict[str, Any]] = []

        def ask() -> None:
            text = json.dumps(mine)
            answer.append(json.loads(self.pulses.compare_set("error", "", text)))
            if answer[0]["rank"] == self.rank:
                others = [f"knows/{rank}" for rank in range(self.world_size) if rank != self.rank]
                self.pulses.wait(others, timedelta(seconds=GRACE_SECONDS))

        thread = threading.Thread(target=quietly, args=(ask,), daemon=True)
        thread.start()
        thread.join(GRACE_SECONDS + 1)
        return answer[0] if answer else None

    # ------------------------------------------------------------ the thread that talks to the store

    def exchange(self) -> None:
        """Write the pulse, read what the others wrote; stands still where the store does."""
        for number in itertools.count(1):
            if self.over.wait(self.tick):
                return
            try:
                age = self.pulse(number)
                if self.world_size > 1:
                    self.hear()
                    # the first rank may hold the store: what it did last must be known when it falls silent
                    self.look(range(self.world_size) if age > self.seconds / 2 else [0])
                self.answered = time.monotonic()
            except Exception:
                time.sleep(self.tick)  # whoever held the store is gone: the exchange of gradients will say so as well

    def pulse(self, number: int) -> float:
        """Write that this process is alive, and for how long it has stood in the same phase."""
        age = time.monotonic() - self.moved
        at, exchanging = self.where() if age > 2 * self.tick else ("", False)
        pulse = {"number": number, "age": round(age, 1), "at": at, "exchanging": exchanging}
        self.note(self.rank, self.standing, pulse)
        if self.world_size > 1:
            self.pulses.set(f"pulse/{self.rank}", json.dumps(pulse))
        return age

    def hear(self) -> None:
        """Did another rank stop with an error?"""
        if self.error is not None or self.leaving or not self.pulses.check(["error"]):
            return
        if self.over.wait(MOMENT_SECONDS) or self.leaving:
            return  # all ranks ran into the same, this one a moment later
        self.learn(json.loads(self.pulses.get("error")))
        self.pulses.set(f"knows/{self.rank}", "1")

    def learn(self, error: dict[str, Any]) -> None:
        """Say once that another rank ended the run, before it does: a launcher then ends all others."""
        if self.error is None and self.speaks({error["rank"]}):
            print(f"error: {stopped(error)}", file=sys.stderr, flush=True)
        self.error = error

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

    def where(self) -> tuple[str, bool]:
        """In which line the thread that trains stands, and whether it waits for other ranks there."""
        frame = sys._current_frames().get(self.main)
        names: list[tuple[str, int, str]] = []
        while frame and len(names) < 30:
            names.append((frame.f_code.co_filename, frame.f_lineno, frame.f_code.co_name))
            frame = frame.f_back
        waits = ("torch/distributed/", "nn/parallel/distributed", "deepspeed/comm", "torch/autograd/graph")
        own = next((name for name in names if "/torch/" not in name[0] and "/deepspeed/" not in name[0]), None)
        inside = any(part in name[0] for name in names[:12] for part in waits)
        return (f"{Path(own[0]).name}:{own[1]} in {own[2]}" if own else ""), inside

    # ------------------------------------------------------------ the thread that judges

    def watch(self) -> None:
        """Compare what is known; touches no store, so that it never stands still itself."""
        while not self.over.wait(self.tick):
            age = time.monotonic() - self.moved
            if self.error is not None:
                self.stop_for_error()
            elif age > self.seconds:
                self.judge(age)
            elif self.told:
                print(f"rank {', '.join(map(str, self.told))} goes on", file=sys.stderr, flush=True)
                self.told = ()

    def stop_for_error(self) -> None:
        """Give the thread that trains time to leave by itself, then end the process under it."""
        self.over.wait(GRACE_SECONDS)
        if self.over.is_set() or self.leaving or self.error is None:
            return
        end(self.error["code"])

    def judge(self, age: float) -> None:
        """Say for whom this rank waits; end the run where that took too long."""
        seen = dict(self.seen)
        now = time.monotonic()
        quiet = max(3 * self.tick, self.seconds / 4)
        if self.world_size > 1 and now - self.answered > quiet:  # the store's own machine or process stands still
            found = [seen[0]] if self.rank and 0 in seen else []
        else:
            found = suspects(list(seen.values()), now, self.seconds, quiet)
        ranks = tuple(one.standing.rank for one in found)
        if not found:
            return
        ends = age > self.stop_seconds and not any(one.standing.slow and one.answers(now, quiet) for one in found)
        if ranks == self.told and not ends:
            return
        told = sentence(self.standing, age, found, now, quiet)
        self.told = ranks
        if self.speaks(set(ranks)):
            self.write(age, found, ends, quiet, now)
            after = "the run ends" if ends else f"the run ends after {self.stop_seconds:g} s"
            print(f"hang: {told}; {after}", file=sys.stderr, flush=True)
        if ends:
            time.sleep(0 if self.speaks(set(ranks)) else 2 * self.tick)
            end(EXIT_CODE)

    def speaks(self, others: set[int]) -> bool:
        """Is this the first rank that is not one of these? Where all are, the first of all."""
        waiting = [rank for rank in range(self.world_size) if rank not in others] or [0]
        return self.rank == waiting[0]

    def write(self, age: float, found: Sequence[Seen], ends: bool, quiet: float, now: float) -> None:
        """A line in `hang.jsonl`, for whoever was not there."""
        line = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "rank": self.rank,
            "step": self.standing.step,
            "phase": self.standing.phase,
            "seconds": round(age, 1),
            "waits_for": [one.told(now, quiet) for one in found],
            "ends": ends,
        }
        try:
            with (self.folder / "hang.jsonl").open("a") as file:
                file.write(json.dumps(line) + "\n")
        except OSError:  # the folder lies on another machine: the screen has it
            pass


def connection(world_size: int, number: int) -> Any:
    """A way to the store of its own, so that nobody waits for an answer meant for another; of one process, a store in
    memory."""
    if world_size == 1:
        return torch.distributed.HashStore()
    from torch.distributed.distributed_c10d import _get_default_store  # no public name for it

    store: Any = _get_default_store()
    while isinstance(store, torch.distributed.PrefixStore):
        store = store.underlying_store
    own = store.clone()
    restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return torch.distributed.PrefixStore(f"mllm/{restarts}/{number}", own)


def put(store: Any, key: str, value: str) -> None:
    quietly(lambda: store.set(key, value))


def quietly(work: Callable[[], Any]) -> None:
    """What must not disturb the run: whoever holds the store may be gone."""
    with contextlib.suppress(Exception):
        work()


def stopped(error: dict[str, Any]) -> str:
    return f"rank {error['rank']} stopped at step {error['step']}: {error['message']}"


def end(code: int) -> None:
    """Leave at once: the thread that trains cannot be called back from an exchange."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
