"""What a run says while it runs: one line a step in `metrics.jsonl`, a progress bar with the same numbers,
`loss.png`.

Enters: the numbers of each step. Leaves: the files in the stage folder. Only rank 0 makes one of these.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

REDRAW_SECONDS = 30.0
"""How often loss.png is drawn anew: often enough to watch, too seldom to cost."""


class Metrics:
    """A context: the bar runs inside it, the picture is final when it is left. Off the main process it is mute."""

    def __init__(self, folder: Path, first_step: int, last_step: int, is_main: bool) -> None:
        self.folder, self.is_main = folder, is_main
        self.lines = keep_before(folder / "metrics.jsonl", first_step) if is_main else []
        self.first_step, self.last_step = first_step, last_step
        self.before = self.lines[-1]["seconds"] if self.lines else 0.0
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[numbers]}"),
            disable=not is_main,
        )

    def __enter__(self) -> Metrics:
        self.task = self.bar.add_task("train", total=self.last_step, completed=self.first_step, numbers="")
        self.started = self.drawn = time.perf_counter()
        self.bar.start()
        return self

    def step(self, step: int, numbers: dict[str, Any]) -> None:
        """One optimiser step: a line in the file, a tick of the bar."""
        if not self.is_main:
            return
        seconds = self.before + time.perf_counter() - self.started
        rate = numbers["tokens"] / max(1e-9, seconds - (self.lines[-1]["seconds"] if self.lines else 0.0))
        line = {"step": step, **numbers, "seconds": round(seconds, 3), "tokens_per_second": round(rate, 1)}
        self.lines.append(line)
        with (self.folder / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")
        self.bar.update(self.task, advance=1, numbers=f"loss {line['loss']:.3f}  {rate:,.0f} tok/s")
        if time.perf_counter() - self.drawn > REDRAW_SECONDS:
            self.drawn = time.perf_counter()
            draw_loss(self.lines, self.folder / "loss.png")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bar.stop()
        if self.is_main:
            draw_loss(self.lines, self.folder / "loss.png")


def keep_before(path: Path, step: int) -> list[dict[str, Any]]:
    """The lines of earlier steps, after cutting the file there: a resumed run writes the later ones anew."""
    if not path.exists():
        return []
    whole = [line for line in path.read_text().splitlines() if line.endswith("}")]  # a cut-off run may leave half a one
    kept = [line for line in map(json.loads, whole) if line["step"] <= step]
    path.write_text("".join(json.dumps(line) + "\n" for line in kept))
    return kept


def draw_loss(lines: list[dict[str, Any]], path: Path) -> None:
    """The loss curve as a picture; nothing where no step has run."""
    if not lines:
        return
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.plot([line["step"] for line in lines], [line["loss"] for line in lines], linewidth=1.2)
    axes.set(xlabel="step", ylabel="loss", title=path.parent.name)
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
