"""Workers of a loader outlive a signal that is meant for the run.

Enters: a dataset and the items that are asked of it. Leaves: what it makes of them, read ahead by workers that heed
SIGTERM only from the process that started them. A scheduler, and `torchrun`, signal every process of a group: a run
that is told to go still needs the batches of the step that it finishes, and a worker that dies of the signal would
take it down before it has written a checkpoint.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

from torch.utils.data import DataLoader, Dataset

T = TypeVar("T")
MEANT_FOR_THE_RUN = {signal.SIGTERM, signal.SIGUSR1}


def read_ahead(dataset: Dataset[T], items: Iterable[Any], num_workers: int, pin_memory: bool = False) -> Iterator[T]:
    """`dataset[item]` for each item, in their order."""
    loader: DataLoader[T] = DataLoader(
        dataset,
        batch_size=None,
        sampler=items,
        num_workers=num_workers,
        pin_memory=pin_memory,
        worker_init_fn=heed_the_parent_alone,
    )
    with starting_workers():
        return iter(loader)


@contextlib.contextmanager
def starting_workers() -> Iterator[None]:
    """Processes that start inside have the signals blocked from their first moment; ours wait until it is left."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, MEANT_FOR_THE_RUN)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def heed_the_parent_alone(worker: int) -> None:
    """Called in each worker: what is blocked is taken up by a thread, which can see who sent it."""
    signal.pthread_sigmask(signal.SIG_BLOCK, MEANT_FOR_THE_RUN)
    threading.Thread(target=heed, daemon=True).start()


def heed() -> None:
    """End this process when its parent says so: that is how it clears up at its own end."""
    while True:
        signal_heard = signal.sigwaitinfo(MEANT_FOR_THE_RUN)
        if signal_heard.si_signo == signal.SIGTERM and signal_heard.si_pid == os.getppid():
            os._exit(0)
