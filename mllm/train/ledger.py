"""What became of every sample: nothing is dropped in silence.

Enters: the tally of an index or a stream, and the batches of each step, whose holes carry their faults. Leaves: a line
for each fault in `quarantine.jsonl`, the sums in `ledger.json` (read = used + skipped), and an error once more is lost
than the run allows. The plan never shifts: a hole keeps the place of its sample.
"""

from __future__ import annotations

import functools
import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mllm.data.index import SHOWN
from mllm.data.indexing.tally import IN_A_ROW, Tally
from mllm.data.plan import Plan
from mllm.data.streams.plan import StreamPlan
from mllm.train.saving import durable
from mllm.types import Batch, Fault

if TYPE_CHECKING:
    from accelerate import Accelerator


class Quarantine:
    """`quarantine.jsonl`: each fault once, of the index or stream and of the run, over all resumes of the run."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "quarantine.jsonl"
        self.lines = durable.read_lines(self.path)
        if self.path.exists():  # without the half line that a run that was killed may leave
            durable.write_lines(self.path, self.lines)
        self.known = {self.name(line) for line in self.lines}

    def add(self, faults: Iterable[Fault], step: int | None = None) -> None:
        """Append what does not stand there; `step` is the one that met it, None where reading did."""
        for fault in faults:
            line = {"id": fault.id, "where": fault.where, "cause": fault.cause, "kind": fault.kind, "step": step}
            if self.name(line) not in self.known:
                self.known.add(self.name(line))
                self.lines.append(line)
                with self.path.open("a") as file:
                    file.write(json.dumps(line) + "\n")

    @staticmethod
    def name(line: dict[str, Any]) -> tuple[str, str, str]:
        return line["id"], line["where"], line["cause"]


class Ledger:
    """What is lost so far, the same on every rank."""

    def __init__(self, folder: Path, tally: Tally, max_bad_share: float) -> None:
        self.folder, self.tally, self.max_bad_share = folder, tally, max_bad_share
        self.met: set[str] = set()
        """Ids of the samples that could not be read when their turn came: of an index, each counts once."""
        self.in_a_row = 0

    @functools.cached_property
    def quarantine(self) -> Quarantine:
        """Opened by the main process alone."""
        return Quarantine(self.folder)

    def position(self) -> dict[str, int]:
        """What a checkpoint keeps, beside the lines of the quarantine."""
        return {"holes_in_a_row": self.in_a_row}

    def resume(self, accelerator: Accelerator, first_step: int, position: dict[str, Any] | None) -> None:
        """Remember what the steps before `first_step` met; a stream's position has told its tally."""
        from accelerate.utils import broadcast_object_list

        self.in_a_row = (position or {}).get("holes_in_a_row", 0)
        if self.tally.streamed:
            return
        found: list[dict[str, str]] = [{}]
        if accelerator.is_main_process:
            met = [line for line in self.quarantine.lines if line["step"] is not None and line["step"] <= first_step]
            found = [{line["id"]: line["kind"] for line in met}]
        [holes] = broadcast_object_list(found)
        self.met, self.tally.holes = set(holes), Counter(holes.values())

    def note(self, accelerator: Accelerator, block: list[Batch], plan: Plan | StreamPlan, step: int) -> None:
        """Collect the holes of one step from all ranks; `step` counts from 0.

        Raises:
            ValueError: too many samples are unreadable, in all or one after the other; names the last ones.
        """
        from accelerate.utils import gather_object

        new: list[Fault] = gather_object([fault for batch in block for fault in batch["faults"]])
        if not new:
            self.in_a_row = 0
            return
        self.count(new)
        if accelerator.is_main_process:
            self.quarantine.add(new, step + 1)
        bad = {fault.number for fault in new}
        for number in (number for row in plan.rows(step) for number in row):
            self.in_a_row = self.in_a_row + 1 if number in bad else 0
            if self.in_a_row == IN_A_ROW:
                self.stop(accelerator, f"{IN_A_ROW} samples one after the other cannot be read", new)
        if self.tally.too_bad(self.max_bad_share):
            left_out = self.tally.skipped.total() - self.tally.skipped["filtered"]
            told = f"{self.tally.holes.total()} samples cannot be read beside {left_out} that were left out before"
            self.stop(accelerator, f"{told}, more than data.max_bad_share allows ({self.max_bad_share:.1%})", new)

    def count(self, new: list[Fault]) -> None:
        """Each sample of an index once, each reading of a stream."""
        for fault in new:
            if self.tally.streamed or fault.id not in self.met:
                self.met.add(fault.id)
                self.tally.holes[fault.kind] += 1

    def stop(self, accelerator: Accelerator, what: str, last: list[Fault]) -> None:
        if accelerator.is_main_process:
            self.write()
        shown = "\n  ".join(map(str, last[-SHOWN:]))
        raise ValueError(
            f"{what}:\n  {shown}\nMend or remove them, or raise data.max_bad_share; "
            f"all are named in {self.folder / 'quarantine.jsonl'}"
        )

    def write(self) -> None:
        durable.write_text(self.folder / "ledger.json", json.dumps(self.tally.summary(), indent=1) + "\n")
