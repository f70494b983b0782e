"""Bytes of all tensors that are alive, from one operation of torch to the next.

Enters: anything that computes with tensors. Leaves: how many bytes were alive at most, and what they were for. It
works on real tensors (a measurement) and on tensors without data (a prediction): a storage counts from the operation
that makes it until nothing refers to it. What a kernel takes and gives back within one operation is not seen.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class Tracker(TorchDispatchMode):
    """A context. What was alive before it is counted only where `count` names it."""

    def __init__(self, before: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.alive: dict[int, tuple[str, int]] = {}
        """Storage -> what it is for, bytes."""
        self.now: Counter[str] = Counter()
        self.total = 0
        self.peaks: dict[str, Counter[str]] = {}
        """In each phase, what was alive when it was most."""
        self.highest: Counter[str] = Counter()
        """In each phase, the total of its peak."""
        self.phase = ""
        for tensor in before:
            self.alive[key(tensor)] = "", 0

    @contextmanager
    def during(self, phase: str) -> Iterator[None]:
        """What is made in here is for that, and its peak is kept by that name."""
        outer, self.phase = self.phase, phase
        yield
        self.phase = outer

    def count(self, tensor: Tensor, purpose: str) -> None:
        """Take up a tensor, or tell anew what it is for."""
        storage = tensor.untyped_storage()
        if (name := storage._cdata) in self.alive:
            known, size = self.alive[name]
            self.now[known] -= size
            self.now[purpose] += size
            self.alive[name] = purpose, size
            return
        size = storage.nbytes()
        self.alive[name] = purpose, size
        self.now[purpose] += size
        self.total += size
        weakref.finalize(storage, self.forget, name)
        if self.total > self.highest[self.phase]:
            self.highest[self.phase] = self.total
            self.peaks[self.phase] = +self.now

    def forget(self, name: int) -> None:
        purpose, size = self.alive.pop(name)
        self.now[purpose] -= size
        self.total -= size

    @property
    def peak(self) -> int:
        """The most that was alive at one time."""
        return max(self.highest.values(), default=0)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        for made in tree_iter(out):
            if isinstance(made, Tensor) and made.device.type != "meta" and key(made) not in self.alive:
                self.count(made, self.phase)
        return out


def key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
