"""One rank's error as the end of all.

Enters: the error with which this rank leaves its steps, or the word of another that it did. Leaves: on every rank the
error of whoever was first, said once on the screen before its process ends, since a launcher then ends all others.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from datetime import timedelta
from typing import Any

from mllm.train.watching.store import put, quietly
from mllm.train.watching.waits import speaks

GRACE_SECONDS = 5.0
"""How long ranks have to stop by themselves once one of them has stopped with an error; then they are stopped."""
MOMENT_SECONDS = 0.5
"""How far apart ranks run into an error that is the same for all."""


class RankStopped(RuntimeError):
    """Another rank ended the run, and it is said; `code` is what this process exits with."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


class Stops:
    """What this rank knows of errors; `over` is set once it has left its steps."""

    def __init__(self, rank: int, world_size: int, store: Any, over: threading.Event) -> None:
        self.rank, self.world_size, self.store, self.over = rank, world_size, store, over
        self.leaving = False
        self.error: dict[str, Any] | None = None
        """What another rank stopped with."""

    def leave(self, error: Exception, step: int) -> None:
        """Tell the others why this rank stops, or learn that another one was first.

        Raises:
            RankStopped: it was another one.
        """
        self.leaving = True
        if self.world_size == 1:
            return
        mine = {
            "rank": self.rank,
            "step": step,
            "message": str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}",
            "code": 2 if isinstance(error, ValueError) else 1,
        }
        first = self.first_error(mine)
        if first is None or first["message"] == mine["message"]:
            # one that all ranks meet is said by the first of them
            error.silent = first is not None and first["rank"] != self.rank  # type: ignore[attr-defined]
            put(self.store, f"knows/{self.rank}", "1")
            return
        self.learn(first)
        put(self.store, f"knows/{self.rank}", "1")
        raise RankStopped(stopped(first), first["code"]) from None

    def first_error(self, mine: dict[str, Any]) -> dict[str, Any] | None:
        """The error that ends the run, this rank's if no other came before; None where nobody can be asked. Whoever
        came first waits until all others know, since they may lose the store with it."""
        answer: list[dict[str, Any]] = []

        def ask() -> None:
            text = json.dumps(mine)
            answer.append(json.loads(self.store.compare_set("error", "", text)))
            if answer[0]["rank"] == self.rank:
                others = [f"knows/{rank}" for rank in range(self.world_size) if rank != self.rank]
                self.store.wait(others, timedelta(seconds=GRACE_SECONDS))

        thread = threading.Thread(target=quietly, args=(ask,), daemon=True)
        thread.start()
        thread.join(GRACE_SECONDS + 1)
        return answer[0] if answer else None

    def hear(self) -> None:
        """Did another rank stop with an error?"""
        if self.error is not None or self.leaving or not self.store.check(["error"]):
            return
        if self.over.wait(MOMENT_SECONDS) or self.leaving:
            return  # all ranks ran into the same, this one a moment later
        self.learn(json.loads(self.store.get("error")))
        self.store.set(f"knows/{self.rank}", "1")

    def learn(self, error: dict[str, Any]) -> None:
        """Say once that another rank ended the run, before it does: a launcher then ends all others."""
        if self.error is None and speaks(self.rank, self.world_size, {error["rank"]}):
            print(f"error: {stopped(error)}", file=sys.stderr, flush=True)
        self.error = error

    def follow(self) -> None:
        """Give the thread that trains time to leave by itself, then end the process under it."""
        self.over.wait(GRACE_SECONDS)
        if self.over.is_set() or self.leaving or self.error is None:
            return
        end(self.error["code"])


def stopped(error: dict[str, Any]) -> str:
    return f"rank {error['rank']} stopped at step {error['step']}: {error['message']}"


def end(code: int) -> None:
    """Leave at once: the thread that trains cannot be called back from an exchange."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
