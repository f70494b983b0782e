"""A wait in vain, said and ended.

Enters: what this rank does, for how long, and the ranks that it is found to wait for. Leaves: one line on the screen
and in `hang.jsonl`, from one rank, anew when others are waited for; after `stop_seconds` the end of the process.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from mllm.train.watching.stops import end
from mllm.train.watching.waits import Seen, Standing, sentence, speaks

EXIT_CODE = 3
"""Of a run that was ended because a rank stood still."""


class Alarm:
    """Remembers which ranks were named last."""

    def __init__(
        self, rank: int, world_size: int, folder: Path, stop_seconds: float, quiet: float, patience: float
    ) -> None:
        self.rank, self.world_size, self.folder, self.stop_seconds = rank, world_size, folder, stop_seconds
        self.quiet = quiet
        """Seconds without a pulse after which a process does not answer."""
        self.patience = patience
        """Seconds that a rank lets the one that speaks speak, before it ends."""
        self.told: tuple[int, ...] = ()

    def sound(self, own: Standing, age: float, found: Sequence[Seen], now: float) -> None:
        """Say for whom this rank waits; end the run where that took too long."""
        if not found:
            return
        ranks = tuple(one.standing.rank for one in found)
        ends = age > self.stop_seconds and not any(one.standing.slow and one.answers(now, self.quiet) for one in found)
        if ranks == self.told and not ends:
            return
        told = sentence(own, age, found, now, self.quiet)
        self.told = ranks
        first = speaks(self.rank, self.world_size, set(ranks))
        if first:
            self.write(own, age, found, ends, now)
            after = "the run ends" if ends else f"the run ends after {self.stop_seconds:g} s"
            print(f"hang: {told}; {after}", file=sys.stderr, flush=True)
        if ends:
            time.sleep(0 if first else self.patience)
            end(EXIT_CODE)

    def rest(self) -> None:
        """Everything moves: say so, if it did not before."""
        if self.told:
            print(f"rank {', '.join(map(str, self.told))} goes on", file=sys.stderr, flush=True)
            self.told = ()

    def write(self, own: Standing, age: float, found: Sequence[Seen], ends: bool, now: float) -> None:
        """A line in `hang.jsonl`, for whoever was not there."""
        line = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "rank": self.rank,
            "step": own.step,
            "phase": own.phase,
            "seconds": round(age, 1),
            "waits_for": [one.told(now, self.quiet) for one in found],
            "ends": ends,
        }
        try:
            with (self.folder / "hang.jsonl").open("a") as file:
                file.write(json.dumps(line) + "\n")
        except OSError:  # the folder lies on another machine: the screen has it
            pass
