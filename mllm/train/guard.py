"""A step that would spoil the model is not taken.

Enters: the loss and the gradient norm of each step, the same numbers on every rank. Leaves: the word whether the
weights may move. Where they may not, the samples of the step, from all ranks, with the loss of each micro-batch, in
`guard.jsonl`, and an error that names them, or a step left out, by policy.

What is known of earlier steps is read from the lines of `metrics.jsonl` alone, so that a resumed run decides as the one
that was not cut off.
"""

from __future__ import annotations

import json
import math
import sys
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, pstdev
from typing import TYPE_CHECKING, Any, Literal

from mllm.schema import NotNegative, Positive, Schema
from mllm.train.saving.durable import keep_before, read_lines
from mllm.types import Batch

if TYPE_CHECKING:
    from accelerate import Accelerator

Policy = Literal["stop", "skip"]
FEWEST = 10
"""Losses that must be known before one of them can be a leap."""
FLATTEST = 0.01
"""The standard deviation counts as at least this share of the mean: where a loss stands nearly still, its noise is no
measure."""
SHOWN = 5


@dataclass
class GuardConfig(Schema):
    """What happens where a step's loss or gradient is not finite, or its loss leaps."""

    policy: Policy = "stop"
    """`stop`: end the run before the weights move. `skip`: leave the step out, weights and optimiser stay as they
    are."""
    spike: NotNegative = 0.0
    """Standard deviations above the mean of the last `window` losses from which on a loss is a leap, e.g. 6; 0 lets
    losses leap."""
    window: Positive = 100
    """Steps that mean and standard deviation are taken of; steps that were left out do not count."""
    max_skips: Positive = 10
    """So many steps left out one after the other stop the run."""


class Guard:
    """The losses so far, and what is wrong with the present step; the same on every rank."""

    def __init__(self, config: GuardConfig, folder: Path) -> None:
        self.config, self.folder = config, folder
        self.losses: deque[float] = deque(maxlen=config.window)
        self.skipped = self.in_a_row = 0
        self.cause = ""
        """Why the present step is not taken."""
        self.seen: Sequence[tuple[Batch, float, float]] = ()

    def resume(self, accelerator: Accelerator, first_step: int) -> None:
        """Remember the steps before `first_step`; what was written of later ones is taken back."""
        from accelerate.utils import broadcast_object_list

        told: list[Any] = [None]
        if accelerator.is_main_process:
            lines = [line for line in read_lines(self.folder / "metrics.jsonl") if line["step"] <= first_step]
            told = [[(line["loss"], line.get("steps_skipped", 0)) for line in lines]]
            keep_before(self.folder / "guard.jsonl", first_step)
        self.remember(broadcast_object_list(told)[0])

    def remember(self, history: Iterable[tuple[float, int]]) -> None:
        """Take in the loss of each step and the number of steps left out so far."""
        for loss, skipped in history:
            self.count(loss, skipped > self.skipped)

    def count(self, loss: float, left_out: bool) -> None:
        self.in_a_row = self.in_a_row + 1 if left_out else 0
        self.skipped += left_out
        if not left_out:
            self.losses.append(loss)

    def look(self, seen: Sequence[tuple[Batch, float, float]]) -> None:
        """This rank's micro-batches of the step, each with its summed loss and its weight."""
        self.cause, self.seen = "", seen

    def refuses(self, loss: float, grad_norm: float = 0.0) -> bool:
        """Must the weights stay as they are? `loss` and `grad_norm` are those of the whole step."""
        if self.cause:
            return True
        if not math.isfinite(loss):
            self.cause = f"the loss is {loss}"
        elif not math.isfinite(grad_norm):
            self.cause = f"the gradient norm is {grad_norm} (loss {loss:.4g})"
        elif self.config.spike and len(self.losses) >= min(FEWEST, self.config.window):
            mean, deviation = fmean(self.losses), pstdev(self.losses)
            if loss > mean + self.config.spike * max(deviation, FLATTEST * abs(mean)):
                self.cause = (
                    f"the loss {loss:.4g} is more than {self.config.spike:g} standard deviations ({deviation:.2g}) "
                    f"above the mean {mean:.4g} of {len(self.losses)} steps"
                )
        return bool(self.cause)

    def note(self, accelerator: Accelerator, step: int, numbers: dict[str, Any]) -> dict[str, Any]:
        """Close a step, counted from 1; write down what was refused. Every rank calls.

        Returns:
            `numbers`, with the steps left out so far.

        Raises:
            ValueError: the step was refused, and the policy, or the number of such steps, stops the run.
        """
        from accelerate.utils import gather_object

        self.count(numbers["loss"], bool(self.cause))
        if not self.cause:
            return {**numbers, "steps_skipped": self.skipped}
        records = gather_object(self.records(accelerator.process_index))
        stops = self.config.policy == "stop" or self.in_a_row >= self.config.max_skips
        file = self.folder / "guard.jsonl"
        if accelerator.is_main_process:
            known = {key: numbers[key] for key in ("loss", "grad_norm")}
            line = {"step": step, "cause": self.cause, "action": "stop" if stops else "skip", **known}
            with file.open("a") as opened:
                opened.write(json.dumps({**line, "micro_batches": records}) + "\n")
        told = f"step {step}: {self.cause}. {suspects(records)}; all samples of the step are named in {file}"
        if stops:
            raise ValueError(f"{told}. {self.advice()}")
        if accelerator.is_main_process:
            print(f"left out {told}", file=sys.stderr, flush=True)
        return {**numbers, "steps_skipped": self.skipped}

    def records(self, rank: int) -> list[dict[str, Any]]:
        """This rank's micro-batches of the step, each with its loss per unit of weight and its samples."""
        return [
            {
                "rank": rank,
                "micro_batch": number,
                "loss": loss / weight if weight else loss,
                "sample_ids": [name for row in batch["sample_ids"] for name in row],
                "where": batch["where"],
            }
            for number, (batch, loss, weight) in enumerate(self.seen)
        ]

    def advice(self) -> str:
        again = "--resume goes on from the last checkpoint"
        if self.config.policy == "stop":
            return (
                f"The weights did not move. Look at these samples, lower the learning rate, or leave such steps out "
                f"with train.guard.policy skip; {again}"
            )
        return f"{self.in_a_row} steps were left out in a row (train.guard.max_skips): lower the learning rate; {again}"


def suspects(records: list[dict[str, Any]]) -> str:
    """The micro-batches to look at first: those without a finite loss, or the one with the highest."""
    broken = [record for record in records if not math.isfinite(record["loss"])]
    named = broken or [max(records, key=lambda record: record["loss"])]
    shown = [
        f"micro-batch {record['micro_batch']} of rank {record['rank']} (loss {record['loss']:.4g}): "
        + ", ".join(record["where"][:SHOWN])
        + (", ..." if len(record["where"]) > SHOWN else "")
        for record in named[:SHOWN]
    ]
    return "Look at " + "; ".join(shown)
