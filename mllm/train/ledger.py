"""Samples that turned out unreadable while training: nothing is dropped in silence.

Enters: the batches of each step, whose holes carry their cause. Leaves: a line for each in `quarantine.jsonl`, and
an error once there are more than the run allows. The plan never shifts: a hole keeps the place of its sample.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from mllm.types import Batch

if TYPE_CHECKING:
    from accelerate import Accelerator


class Ledger:
    """The faults of the run so far, the same list on every rank."""

    def __init__(self, folder: Path, most: int) -> None:
        self.path, self.most = folder / "quarantine.jsonl", most
        self.faults: list[str] = []

    def note(self, accelerator: Accelerator, block: list[Batch]) -> None:
        """Collect the holes of one step from all ranks.

        Raises:
            ValueError: more than `most` samples are unreadable; names the last ones.
        """
        from accelerate.utils import gather_object

        new = gather_object([fault for batch in block for fault in batch["faults"]])
        if not new:
            return
        self.faults += new
        if accelerator.is_main_process:
            with self.path.open("a") as file:
                file.writelines(json.dumps({"fault": fault}) + "\n" for fault in new)
        if len(self.faults) > self.most:
            raise ValueError(
                f"{len(self.faults)} samples cannot be read, more than data.max_bad_share allows ({self.most}):\n  "
                + "\n  ".join(self.faults[-5:])
                + f"\nMend or remove them, or raise data.max_bad_share; all are named in {self.path}"
            )
