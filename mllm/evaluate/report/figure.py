"""The report as one picture: headline, loss of both stages, accuracy by question type, a wall of answers.

Enters: a `Story`. Leaves: a PNG. matplotlib is imported when the first figure is drawn, and never opens a window.
"""

from __future__ import annotations

import textwrap
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mllm.evaluate.report.story import RIGHT, STAGE_COLOURS, WRONG, Curve, Story

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import SubFigure

    from mllm.evaluate.exact import Answer

INK, FAINT, LINE, PAPER = "#1f2430", "#737b8a", "#e3e6eb", "#fcfcfd"
WIDTH, CHARTS_HEIGHT, TILE_HEIGHT = 14.0, 5.6, 3.2  # inches
COLUMNS = 6
STYLE: Any = {
    "font.family": "DejaVu Sans",
    "text.color": INK,
    "axes.edgecolor": LINE,
    "axes.labelcolor": FAINT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": LINE,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "ytick.minor.size": 0,
    "legend.frameon": False,
    "figure.facecolor": PAPER,
    "axes.facecolor": PAPER,
}


def draw_figure(story: Story, path: Path) -> None:
    """Draw `story` into the PNG `path`."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = -(-len(story.gallery) // COLUMNS)
    heights = [CHARTS_HEIGHT, max(rows * TILE_HEIGHT, 0.1)]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, sum(heights)), dpi=120)
        FigureCanvasAgg(figure)
        parts: Any = figure.subfigures(2, 1, height_ratios=heights)
        _charts(parts[0], story, heights[0])
        _gallery(parts[1], story, rows)
        figure.savefig(path)


def _charts(part: SubFigure, story: Story, height: float) -> None:
    part.text(0.045, 1 - 0.45 / height, story.title, fontsize=21, fontweight="bold", va="center")
    _headline(part, story, 1 - 1.1 / height)
    losses, bars = part.subplots(1, 2, width_ratios=(5, 8))
    part.subplots_adjust(left=0.065, right=0.975, top=1 - 2.15 / height, bottom=0.12, wspace=0.13)
    _losses(losses, story.curves)
    _bars(bars, story)


def _headline(part: SubFigure, story: Story, y: float) -> None:
    """One number a result, in the colour of its bars."""
    for at, (name, result) in enumerate(story.results.items()):
        x = 0.045 + 0.17 * at
        part.text(x, y, f"{result['accuracy']:.1%}", fontsize=20, color=story.colours[name], va="baseline")
        part.text(x, y - 0.042, name, fontsize=10, fontweight="bold", va="baseline")
        part.text(x, y - 0.077, story.notes[name], fontsize=8, color=FAINT, va="baseline")


def _losses(axes: Axes, curves: list[Curve]) -> None:
    """The stages one after the other, as they were trained: the second begins where the first ended."""
    start = 0
    for curve, colour in zip(curves, cycle(STAGE_COLOURS), strict=False):
        steps = [start + step for step in curve.steps]
        axes.plot(steps, curve.loss, color=colour, alpha=0.25, linewidth=0.8)
        axes.plot(steps, curve.smooth, color=colour, linewidth=2, label=curve.name)
        if start:
            axes.axvline(start, color=FAINT, linewidth=0.8, linestyle=(0, (2, 3)))
        start = max([start, *steps])
    axes.set_title("Loss", loc="left", fontsize=12, fontweight="bold")
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_xlabel("step")
    if curves:
        axes.legend(fontsize=9, ncols=len(curves), loc="lower right", bbox_to_anchor=(1.0, 1.0))


def _bars(axes: Axes, story: Story) -> None:
    """A group a question type, a bar a result; the thin line is the 95 % interval."""
    width = 0.84 / max(len(story.results), 1)
    for at, (name, result) in enumerate(story.results.items()):
        present = [(x, result["by_type"][kind]) for x, kind in enumerate(story.types) if kind in result["by_type"]]
        centres = [x + (at - (len(story.results) - 1) / 2) * width for x, _ in present]
        heights = [score["accuracy"] for _, score in present]
        axes.bar(centres, heights, width * 0.9, color=story.colours[name], label=name)
        for centre, (_, score) in zip(centres, present, strict=True):
            axes.plot([centre] * 2, score["interval"], color=INK, alpha=0.45, linewidth=1, solid_capstyle="butt")
    axes.set_title("Accuracy by question type", loc="left", fontsize=12, fontweight="bold")
    axes.set_xticks(range(len(story.types)), [textwrap.fill(kind.replace("_", " "), 12) for kind in story.types])
    axes.set_ylim(0, 1.02)
    axes.yaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
    axes.legend(fontsize=9, ncols=len(story.results), loc="lower right", bbox_to_anchor=(1.0, 1.0))


def _gallery(part: SubFigure, story: Story, rows: int) -> None:
    if not story.gallery:
        return
    part.text(0.045, 1 - 0.12 / rows, "Held-out pictures", fontsize=12, fontweight="bold", va="center")
    part.text(0.17, 1 - 0.12 / rows, story.gallery_note, fontsize=9, color=FAINT, va="center")
    grid = part.subplots(rows, COLUMNS, squeeze=False)
    part.subplots_adjust(left=0.045, right=0.975, top=1 - 0.2 / rows, bottom=0.3 / rows, wspace=0.12, hspace=0.5)
    for axes, answer in zip(grid.flat, story.gallery, strict=False):
        _tile(axes, answer)
    for axes in grid.flat[len(story.gallery) :]:
        axes.set_axis_off()


def _tile(axes: Axes, answer: Answer) -> None:
    """One picture in a frame of its verdict's colour, its question and the answer below."""
    from PIL import Image

    colour = RIGHT if answer["correct"] else WRONG
    with Image.open(str(answer["image"])) as image:
        axes.imshow(image.convert("RGB"), interpolation="nearest")
    axes.set(xticks=[], yticks=[])
    axes.grid(False)
    for spine in axes.spines.values():
        spine.set(visible=True, color=colour, linewidth=2.5)
    question = textwrap.wrap(answer["question"], 30, max_lines=3, placeholder=" …")
    below: dict[str, Any] = {"transform": axes.transAxes, "va": "top", "parse_math": False}
    axes.text(0, -0.05, "\n".join(question), fontsize=8.5, **below)
    axes.text(0, -0.07 - 0.08 * len(question), _verdict(answer), fontsize=10, color=colour, weight="bold", **below)


def _verdict(answer: Answer) -> str:
    said = textwrap.shorten(answer["prediction"], 24, placeholder=" …") or "(nothing)"
    if answer["correct"]:
        return f"✓ {said}"
    return f"✗ {said}\n    it is {textwrap.shorten(answer['answer'], 18, placeholder=' …')}"
