"""A run that is told to go finishes its step, writes a checkpoint, and goes.

Enters: SIGTERM (a scheduler takes the machine back, `torchrun` or a user stops the run), SIGUSR1 (as SLURM's
`--signal` warns), or the end of the launcher. Leaves: the same answer on every rank after each step; at the end exit
code 143, from which a job script knows that the same command goes on. A run with all its steps behind it is not told to
go: it writes its stage, and ends with 0.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any

from mllm.train.sums import global_sums

if TYPE_CHECKING:
    from accelerate import Accelerator

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
EXIT_CODE = 128 + signal.SIGTERM
"""143: what a shell tells of a process that SIGTERM ended."""
LAUNCHED = ("TORCHELASTIC_RUN_ID", "ACCELERATE_MIXED_PRECISION")
"""Set by torchrun and by `accelerate launch`. Without a launcher a lost parent means nothing: a shell may log out."""


class Preemption:
    """A context: inside it, and until `leave`, the signals are heard and not obeyed."""

    def __init__(self, accelerator: Accelerator, last_step: int) -> None:
        self.accelerator, self.last_step = accelerator, last_step
        self.heard = False
        self.step: int | None = None
        """After which the run stops early."""
        self.before: dict[signal.Signals, Any] = {}
        self.launcher = os.getppid() if any(name in os.environ for name in LAUNCHED) else None

    def __enter__(self) -> Preemption:
        if threading.current_thread() is threading.main_thread():  # Python lets no other listen
            self.before = {number: signal.signal(number, self.hear) for number in SIGNALS}
        return self

    def hear(self, number: int, frame: FrameType | None) -> None:
        self.heard = True

    def stops(self, step: int) -> bool:
        """Shall the run stop after this step? Every rank asks and gets the same answer, though they hear at different
        times, or only one of them does. The last step ends the run anyway."""
        # `accelerate launch` of one process passes no signal on: it dies, and what it started is left to itself
        self.heard = self.heard or (self.launcher is not None and os.getppid() != self.launcher)
        (told,) = global_sums(self.accelerator, [float(self.heard)])
        if told and step < self.last_step:
            self.step = step
        return self.step is not None

    def leave(self, folder: Path) -> None:
        """After all ranks are done. End the process, if the run was stopped. It goes already: a launcher that sees the
        first rank go, and tells the others to, shall not make another end of theirs."""
        if self.step is None:
            self.restore()
            return
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        if self.accelerator.is_main_process:
            print(
                f"stopped after step {self.step} of {self.last_step}, because the run was told to go: "
                f"{folder / 'checkpoints' / f'step-{self.step}'} is written, the same command with --resume goes on",
                flush=True,
            )
        sys.exit(EXIT_CODE)

    def restore(self) -> None:
        """From now on the signals mean what they meant before."""
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None and self.step is None:
            self.restore()


@contextlib.contextmanager
def to_the_end() -> Iterator[None]:
    """What is begun inside is finished: the signals are ignored, also by the processes that are started there."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, signal.SIG_IGN) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
