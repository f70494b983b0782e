"""Who is waited for: pure, on what is known of every rank.

Enters: of each rank the phase it stands in, how long, and whether its process answers. Leaves: the ranks that the
others wait for, the sentence that says so, and the one rank that says it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

SLOW = 5
"""A phase that may last (the first step, a checkpoint, an evaluation) is told after so many times the seconds."""
SHOWN = 8


@dataclass(frozen=True)
class Standing:
    """Where a rank is. Ranks go through the same phases, so that the number of beats tells who is behind."""

    rank: int
    beats: int = 0
    step: int = 0
    """From 1."""
    phase: str = "starting"
    micro_batch: int = 0
    ids: tuple[str, ...] = ()
    """Of the samples it works on or waits for."""
    slow: bool = False

    def next(self, **changes: Any) -> Standing:
        """The next phase. Ids alone are no new phase, and a new step is numbered anew."""
        beats = 0 if changes.get("step", self.step) != self.step else self.beats + ("phase" in changes)
        return replace(self, **changes, beats=beats)

    def text(self) -> str:
        told = asdict(self)
        del told["rank"]
        return json.dumps(told)

    @classmethod
    def read(cls, rank: int, text: bytes | str) -> Standing:
        told = json.loads(text)
        return cls(rank=rank, **{**told, "ids": tuple(told["ids"])})

    @property
    def place(self) -> tuple[int, int]:
        return self.step, self.beats

    def __str__(self) -> str:
        ids = ", ".join(self.ids[:SHOWN]) + (", ..." if len(self.ids) > SHOWN else "")
        where = f"step {self.step}, {self.phase}, micro-batch {self.micro_batch}"
        return f"{where}, samples {ids}" if ids else where


@dataclass(frozen=True)
class Seen:
    """What another rank told last."""

    standing: Standing
    number: int
    """Of its pulse."""
    heard: float
    """When that pulse came, by the clock of who reads."""
    age: float
    """Seconds since its last beat, when it sent the pulse."""
    at: str
    """The line it stands in."""
    exchanging: bool
    """Whether it waits for other ranks there."""

    def answers(self, now: float, quiet: float) -> bool:
        return now - self.heard <= quiet

    def told(self, now: float, quiet: float) -> dict[str, Any]:
        standing = self.standing
        return {
            "rank": standing.rank,
            "step": standing.step,
            "phase": standing.phase,
            "micro_batch": standing.micro_batch,
            "sample_ids": list(standing.ids),
            "seconds": round(self.age + now - self.heard, 1),
            "answers": self.answers(now, quiet),
            "at": self.at,
        }


def suspects(seen: Sequence[Seen], now: float, seconds: float, quiet: float) -> list[Seen]:
    """The ranks that are waited for; none where all work at the same thing, or in what may last.

    Those whose process does not answer; else those furthest behind; else, where all stand in the same phase, all if
    they load, or those that do not wait for others in it.
    """
    if silent := [one for one in seen if not one.answers(now, quiet)]:
        return silent
    first, last = min(one.standing.place for one in seen), max(one.standing.place for one in seen)
    behind = [one for one in seen if one.standing.place == first]
    if first == last and behind[0].standing.phase != "loading":
        alone = [one for one in behind if not one.exchanging]
        behind = alone if len(alone) < len(behind) else []
    return [one for one in behind if one.age > seconds * (SLOW if one.standing.slow else 1)]


def speaks(rank: int, world_size: int, others: set[int]) -> bool:
    """Is this the first rank that is not one of these? Where all are, the first of all."""
    waiting = [other for other in range(world_size) if other not in others] or [0]
    return rank == waiting[0]


def sentence(own: Standing, age: float, found: Sequence[Seen], now: float, quiet: float) -> str:
    """Who waits in which step for whom, and what they do."""
    each = []
    for one in found:
        why = f"it stands in {one.at}" if one.at else "its process runs"
        if not one.answers(now, quiet):
            why = "its process does not answer: it was stopped, or it or its machine is gone"
        each.append(f"rank {one.standing.rank} ({one.standing}; {why})")
    if any(one.standing.rank == own.rank for one in found):
        return f"no step for {age:.0f} s: " + "; ".join(each)
    return f"rank {own.rank} waits for {age:.0f} s in step {own.step} ({own.phase}) for " + "; ".join(each)
