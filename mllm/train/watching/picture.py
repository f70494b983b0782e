"""`loss.png`: the curves of a run.

Enters: the lines of `metrics.jsonl`. Leaves: a picture with the loss of each step, the held-out losses where they were
measured, and the loss of each source where there are several.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Line = dict[str, Any]
HELD_OUT = {"loss": ("black", "held out"), "shuffled": ("tab:red", "shuffled images"), "blank": ("0.6", "blank")}
"""Colour and name of each held-out curve."""
SOURCES = ("orange", "green", "purple", "brown", "pink", "olive", "cyan")
"""Colours of the curves of sources, the first ones; more could not be told apart."""


def draw_loss(lines: list[Line], path: Path) -> None:
    """The curves as a picture; nothing where no step has run."""
    if not lines:
        return
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for name, steps, losses, style in curves(lines):
        axes.plot(steps, losses, label=name, **style)
    finish(axes, path.parent.name)
    # beside its place first: who looks at the picture while it is drawn sees the last one
    beside = path.with_name(f".{path.name}")
    figure.savefig(beside, dpi=110, format="png")
    beside.replace(path)


def curves(lines: list[Line]) -> Iterator[tuple[str, list[int], list[float], dict[str, Any]]]:
    """Name, steps, losses and style of each curve, the faint ones first."""
    sources = list(dict.fromkeys(name for line in lines for name in line.get("source_loss", {})))
    for name, colour in zip(sources, SOURCES, strict=False) if len(sources) > 1 else []:
        style = {"linewidth": 0.8, "alpha": 0.6, "color": f"tab:{colour}"}
        yield name, *points(lines, "source_loss", name), style
    style = {"linewidth": 1.2, "color": "tab:blue"}
    yield "training", [line["step"] for line in lines], [line["loss"] for line in lines], style
    for name, (colour, label) in HELD_OUT.items():
        steps, losses = points(lines, "held_out", name)
        if steps:
            yield label, steps, losses, {"color": colour, "marker": "o", "markersize": 3, "linewidth": 1}


def points(lines: list[Line], section: str, name: str) -> tuple[list[int], list[float]]:
    """Steps and values of one number that not every line has."""
    having = [line for line in lines if name in line.get(section, {})]
    return [line["step"] for line in having], [line[section][name] for line in having]


def finish(axes: Axes, title: str) -> None:
    axes.set(xlabel="step", ylabel="loss", title=title)
    axes.grid(alpha=0.3)
    if len(axes.get_lines()) > 1:
        axes.legend(fontsize=7, frameon=False, loc="upper right")
