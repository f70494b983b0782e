"""The key-value store by which the ranks found each other, as a place to leave words.

Enters: how many ranks there are and the number of the run. Leaves: a connection of its own, so that nobody waits for
an answer meant for another, and it does not need the exchange of gradients, which may hang.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from typing import Any

import torch


def connection(world_size: int, number: int) -> Any:
    """A way to the store; of one process, a store in memory."""
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
