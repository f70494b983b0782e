"""When steps end and which room of a step the device is in, told from outside the loop that is measured.

Enters: the modules of a model, and any loop whose optimiser is torch's. Leaves: seconds of each step, and of a few more
steps the seconds of each room. Nothing waits for the device before the last step: moments are CUDA events, on a CPU the
clock on the wall. The loop is ended by `Enough` once enough steps are known.
"""

from __future__ import annotations

import contextlib
import math
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, TypeVar

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

ROOMS = ("load", "copy", "encoder", "connector", "LLM", "loss", "backward", "optimiser", "loop")
"""In the order of a step; `loop` is what lies between: embeddings and splice, logging, the loop itself."""
SYNCHRONISES = "called a synchronizing CUDA operation"
"""How torch warns of one."""

T = TypeVar("T")


class Enough(Exception):
    """All steps are known."""


@dataclass
class Budget:
    """How much is measured of a configuration, in steps of the optimiser."""

    warm_up: int = 10
    steps: int = 40
    seconds: float = 60.0
    """Of warm-up and steps, from the end of the first one on, which compiles; behind it the timed steps end, though not
    before `fewest` of them."""
    fewest: int = 5
    rooms: int = 2
    """Steps whose rooms are told apart, and in which waits for the device are counted, after the timed ones."""

    def over(self, accumulation: int) -> Budget:
        """The same number of micro-batches, in steps of several."""
        shares = (self.warm_up, self.steps, self.fewest, self.rooms)
        warm_up, steps, fewest, rooms = (math.ceil(share / accumulation) for share in shares)
        return Budget(warm_up, steps, self.seconds, max(3, fewest), rooms)


@dataclass
class Stopwatch:
    """Called by the end of each step; a context in which the hooks are set."""

    budget: Budget
    device: torch.device
    tick: Callable[[str], None] = lambda words: None
    rooms: dict[str, nn.Module] = field(default_factory=dict)
    """The modules that are rooms of their own."""
    ends: list[Any] = field(default_factory=list)
    """Moments at which the timed steps began and ended."""
    marks: list[tuple[str, Any]] = field(default_factory=list)
    """The rooms entered, and when."""
    syncs: list[str] = field(default_factory=list)
    recompiled: int = 0
    """Graphs that torch.compile made after the warm-up."""
    warmed_up: int = 0
    """Steps in front of the timed ones."""
    clock: Callable[[], float] = time.perf_counter
    """On the wall."""
    handles: list[Any] = field(default_factory=list)
    loader: Any = None
    """That of the loop."""
    laps: dict[str, float] = field(default_factory=dict)
    """Seconds on the wall of what a configuration does beside its steps too."""
    phase: str = "warm-up"
    done: int = 0
    """Steps of this phase."""

    def __post_init__(self) -> None:
        self.began = self.lapped = self.clock()
        self.graphs = 0

    def lap(self, name: str) -> None:
        """That is what was done since the last one."""
        now = self.clock()
        self.laps[name], self.lapped = now - self.lapped, now

    def moment(self) -> Any:
        """Now, on the device's own clock."""
        if self.device.type != "cuda":
            return self.clock()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, start: Any, end: Any) -> float:
        if self.device.type != "cuda":
            return end - start  # type: ignore[no-any-return]
        return start.elapsed_time(end) / 1000  # type: ignore[no-any-return]

    def step_ended(self) -> None:
        """Behind each step of the optimiser.

        Raises:
            Enough: it was the last one.
        """
        self.done += 1
        if self.phase == "warm-up" and self.done == 1:
            self.lap("first step")
            self.began = self.clock()
        if self.phase == "steps":
            self.ends.append(self.moment())
        late = self.clock() - self.began > self.budget.seconds
        if self.phase == "warm-up" and (self.done >= self.budget.warm_up or (late and self.done >= 2)):
            self.wait()
            self.warmed_up, self.graphs = self.done, graphs()
            self.enter("steps")
            self.ends.append(self.moment())
        elif self.phase == "steps" and (self.done >= self.budget.steps or (late and self.done >= self.budget.fewest)):
            self.enter("rooms")
            if self.device.type == "cuda":
                torch.cuda.set_sync_debug_mode("warn")
        elif self.phase == "rooms" and self.done >= self.budget.rooms:
            self.mark("end")
            self.wait()
            self.lap(self.phase)
            self.recompiled = graphs() - self.graphs
            raise Enough
        self.tick(f"{self.phase} {self.done}")
        self.mark("loop")

    def enter(self, phase: str) -> None:
        self.lap(self.phase)
        self.phase, self.done = phase, 0

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")
            torch.cuda.synchronize()

    def mark(self, room: str) -> None:
        """The device goes on in this room."""
        if self.phase == "rooms":
            self.marks.append((room, self.moment()))

    def loads(self, batches: Iterator[T]) -> Iterator[T]:
        """The batches, each with a mark before it is asked for and behind."""
        self.loader = batches
        while True:
            self.mark("load")
            try:
                batch = next(batches)
            except StopIteration:
                return
            self.mark("copy")
            yield batch

    def look_at(self, objective: nn.Module) -> None:
        """Hooks on the module whose call ends with the loss, and on those inside it."""
        self.handles += [
            objective.register_forward_pre_hook(lambda *_: self.mark("loop")),
            objective.register_forward_hook(lambda *_: self.mark("backward")),
        ]
        for name, module in self.rooms.items():
            after = "loss" if name == "LLM" else "loop"
            self.handles.append(module.register_forward_pre_hook(lambda *_, name=name: self.mark(name)))
            self.handles.append(module.register_forward_hook(lambda *_, after=after: self.mark(after)))

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Each step of any optimiser counts in here; `Enough` ends it."""
        self.handles += [
            register_optimizer_step_pre_hook(lambda *_: self.mark("optimiser")),
            register_optimizer_step_post_hook(lambda *_: self.step_ended()),
        ]
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                yield
            except Enough:
                pass
            finally:
                self.wait()
                for handle in self.handles:
                    handle.remove()
                end_workers(self.loader)
        self.syncs = [
            f"{'/'.join(w.filename.split('/')[-3:])}:{w.lineno}" for w in caught if SYNCHRONISES in str(w.message)
        ]

    def step_seconds(self) -> list[float]:
        """Of each timed step."""
        return [self.seconds(start, end) for start, end in pairwise(self.ends)]

    def room_seconds(self) -> dict[str, float]:
        """Of each room, a step's mean."""
        spent: dict[str, float] = defaultdict(float)
        for (room, start), (_, end) in pairwise(self.marks):
            spent[room] += self.seconds(start, end)
        return {room: spent[room] / self.budget.rooms for room in ROOMS if room in spent}


def graphs() -> int:
    """Graphs that torch.compile has made in this process."""
    import torch._dynamo.utils as utils

    return int(utils.counters["stats"]["unique_graphs"])


ENDED: list[Any] = []
"""Loaders whose workers were killed: they are not cleared away before the process ends."""


def end_workers(loader: Any) -> None:
    """Kill the workers of a loader that nobody asks any more, and wait for none: beside a CUDA context each takes
    seconds to end, and the loader would wait for one after the other."""
    from torch.utils.data._utils import signal_handling

    if workers := getattr(loader, "_workers", None):
        signal_handling._remove_worker_pids(id(loader))  # else torch takes their death for an error
        loader._worker_pids_set = False
        for worker in workers:
            worker.kill()
        ENDED.append(loader)
