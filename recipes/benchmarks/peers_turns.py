"""Processes that train in turn, one optimiser step each, so that all of them meet the same machine.

Enters: ways to train, each of which makes its optimiser's steps in a process of its own. Leaves: of each step the CPU
seconds since the step before, of each process its memory and what it returned.

The clock is a hook behind every optimiser's step, the same for all ways: whatever one does between two steps is counted
(loading, forward, backward, notes), and what it does before the first or behind the last is not. There the process
waits until it is its turn again, which takes no CPU time.
"""

from __future__ import annotations

import os
import resource
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

Train = Callable[[Path], Any]
"""Trains what lies in a folder; what it returns is handed on."""
CHILD = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "CUDA_VISIBLE_DEVICES": ""}
"""One thread, no network, no GPU: the same for all."""
PATIENCE = 600
"""Seconds to wait for a process that trains."""
LAST_SECONDS = 10
"""To wait for one that has said all."""


@dataclass
class Trained:
    """What one way said of itself."""

    seconds: list[float] = field(default_factory=list)
    """CPU time of each step, from the second on."""
    peak_bytes: int = 0
    """The most that the process held."""
    training_bytes: int = 0
    """Of it what came after the model was loaded: gradients, moments, activations."""
    returned: Any = None


def in_turn(ways: dict[str, Train], folder: Path, steps: int, tick: Callable[[int], None]) -> dict[str, Trained]:
    """Train all ways side by side; `tick` is told each round.

    Raises:
        RuntimeError: one of them failed; with the end of what it said.
    """
    context = get_context("spawn")
    ends, processes, found = {}, [], {name: Trained() for name in ways}
    try:
        for name, train in ways.items():
            ends[name], other = context.Pipe()
            process = context.Process(target=child, args=(other, train, folder, folder / f"{name}.log"), daemon=True)
            process.start()
            other.close()
            processes.append(process)
        for name in ways:  # each stands behind its first step
            heard(ends[name], name, folder)
        for step in range(1, steps):
            tick(step)
            for name in list(ways)[:: -1 if step % 2 else 1]:
                ends[name].send("go on")
                found[name].seconds.append(heard(ends[name], name, folder))
        for name in ways:
            ends[name].send("go on")
            memory, found[name].returned = heard(ends[name], name, folder)
            found[name].peak_bytes, found[name].training_bytes = memory
        for process in processes:
            process.join(LAST_SECONDS)
    finally:
        for process in processes:
            process.terminate()
    return found


def heard(end: Connection, name: str, folder: Path) -> Any:
    """The next message of a process; an error where it has stopped."""
    log = folder / f"{name}.log"
    try:
        if end.poll(PATIENCE):
            return end.recv()
        cause = f"has said nothing for {PATIENCE} seconds"
    except EOFError:
        cause = "stopped"
    told = log.read_text()[-3000:] if log.exists() else ""
    raise RuntimeError(f"{name} {cause}:\n{told}")


def child(end: Connection, train: Train, folder: Path, log: Path) -> None:
    """One way in its process; what libraries print goes into a file."""
    os.environ.update(CHILD)
    with log.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    try:
        turns = Turns(end)
        returned = train(folder)
        end.send(((peak(), peak() - turns.loaded), returned))
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)


class Turns:
    """The hooks: one behind each optimiser step, one before the first forward pass of all."""

    def __init__(self, end: Connection) -> None:
        import torch
        from torch.nn.modules.module import register_module_forward_pre_hook
        from torch.optim.optimizer import register_optimizer_step_post_hook

        torch.set_num_threads(1)
        self.end, self.start, self.loaded = end, 0.0, 0
        self.first = register_module_forward_pre_hook(self.begins)
        register_optimizer_step_post_hook(self.stepped)

    def begins(self, *_: Any) -> None:
        self.loaded = resident()
        self.first.remove()

    def stepped(self, *_: Any) -> None:
        self.end.send(time.process_time() - self.start)
        self.end.recv()
        self.start = time.process_time()


def resident() -> int:
    """Bytes of memory that the process holds now; where the system does not tell, the most so far."""
    return status("VmRSS") or peak()


def peak() -> int:
    """The most so far. Not `getrusage` where there is better: it remembers the process that started this one."""
    return status("VmHWM") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if sys.platform == "darwin" else 1024
    )


def status(name: str) -> int:
    """A line of Linux' own account, in bytes."""
    told = Path("/proc/self/status")
    lines: Sequence[str] = told.read_text().splitlines() if told.exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:")), 0)
