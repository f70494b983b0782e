"""Workers heed their parent alone."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator

import pytest
import torch
from torch.utils.data import Dataset

from mllm.data.workers import read_ahead


class Numbers(Dataset[torch.Tensor]):
    def __getitem__(self, number: int) -> torch.Tensor:
        return torch.tensor(number)


@pytest.fixture
def working() -> Iterator[tuple[Iterator[torch.Tensor], list[int]]]:
    """The batches, and the processes that make them."""
    batches = read_ahead(Numbers(), iter(range(1000)), num_workers=2)
    yield batches, [worker.pid for worker in batches._workers]  # type: ignore[attr-defined]
    del batches


def from_a_stranger(worker: int, number: signal.Signals) -> None:
    if (child := os.fork()) == 0:
        os.kill(worker, number)
        os._exit(0)
    os.waitpid(child, 0)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_workers_outlive_a_signal_to_the_group(working, number: signal.Signals) -> None:
    batches, workers = working
    for worker in workers:
        from_a_stranger(worker, number)  # at once: they may not have got as far as to listen
    assert [int(next(batches)) for _ in range(20)] == list(range(20))
    for worker in workers:
        from_a_stranger(worker, number)
    assert [int(next(batches)) for _ in range(20)] == list(range(20, 40))


def test_workers_end_when_their_parent_says_so(working) -> None:
    batches, _ = working
    next(batches)
    before = signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's own handler would make an error of it
    for worker in batches._workers:
        worker.terminate()
    limit = time.monotonic() + 60
    while any(worker.is_alive() for worker in batches._workers):
        assert time.monotonic() < limit
        time.sleep(0.01)
    signal.signal(signal.SIGCHLD, before)
