"""What a run says while it runs: one line a step, with the same fields on the screen, in `metrics.jsonl` and in the
trackers; a progress bar; `loss.png`.

Enters: the numbers of each step. Leaves: the files in the stage folder. Only rank 0 speaks.
"""

from __future__ import annotations

import json
import time
from types import TracebackType
from typing import TYPE_CHECKING, Any

from rich import get_console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from mllm.train.saving import durable
from mllm.train.watching.picture import draw_loss
from mllm.train.watching.screen import flat, sentence
from mllm.train.watching.trackers import Tracking

if TYPE_CHECKING:
    from accelerate import Accelerator

    from mllm.train.settings import TrainConfig

REDRAW_SECONDS = 30.0
"""How often loss.png is drawn anew: often enough to watch, too seldom to cost."""


class Metrics:
    """A context: the bar runs inside it, the picture is final when it is left. Off the main process it is mute."""

    def __init__(self, accelerator: Accelerator, train: TrainConfig, first_step: int, last_step: int) -> None:
        self.folder, self.is_main = train.output_dir, accelerator.is_main_process
        told = durable.read_lines(self.folder / "metrics.jsonl") if self.is_main else []
        self.tracking = Tracking(accelerator, train, first_step, told[-1]["step"] if told else 0)
        self.lines = durable.keep_before(self.folder / "metrics.jsonl", first_step) if self.is_main else []
        self.first_step, self.last_step = first_step, last_step
        self.before = self.lines[-1]["seconds"] if self.lines else 0.0
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[numbers]}"),
            disable=not self.is_main,
            auto_refresh=get_console().is_terminal,  # by a thread, ten times a second, though a log file never shows it
        )
        # a terminal has the bar, a log file has nothing else
        self.log_every = train.log_every or (0 if self.bar.console.is_terminal else 1)

    def __enter__(self) -> Metrics:
        self.task = self.bar.add_task("train", total=self.last_step, completed=self.first_step, numbers="")
        self.tracking.__enter__()
        self.started = self.drawn = time.perf_counter()
        self.bar.start()
        return self

    def step(self, step: int, numbers: dict[str, Any]) -> None:
        """One optimiser step: a line in the file and on the screen, a tick of the bar."""
        if not self.is_main:
            return
        seconds = self.before + time.perf_counter() - self.started
        line = {"step": step, **numbers, "seconds": round(seconds, 3)}
        self.lines.append(line)
        with (self.folder / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")
        self.tracking.log(step, flat(line))
        self.show(line)
        if time.perf_counter() - self.drawn > REDRAW_SECONDS:
            self.drawn = time.perf_counter()
            draw_loss(self.lines, self.folder / "loss.png")

    def show(self, line: dict[str, Any]) -> None:
        """The bar moves on; the whole line stands above it where it is due."""
        rate, waited = line["tokens_per_second"], line["data_wait"]
        numbers = f"loss {line['loss']:.3f}  {rate:,.0f} tok/s  waited {waited:.0%}"
        self.bar.update(self.task, advance=1, numbers=numbers)
        is_due = bool(self.log_every) and (line["step"] % self.log_every == 0 or line["step"] == self.last_step)
        if is_due or "held_out" in line:
            self.say(sentence(line, self.last_step))

    def say(self, words: str) -> None:
        """A line above the bar, as it is: neither wrapped nor coloured."""
        if self.is_main:
            self.bar.console.print(words, markup=False, highlight=False, soft_wrap=True)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bar.stop()
        self.tracking.__exit__(kind, error, trace)
        if self.is_main:
            draw_loss(self.lines, self.folder / "loss.png")
