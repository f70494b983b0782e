"""The data set as one picture: headlines, lengths, what is learned, fill of rows, image sizes, images, sources.

Enters: the numbers of `mllm.data.curation.statistics`. Leaves: a PNG in the style of the other reports.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mllm.evaluate.data_report.words import Numbers, bars_of, colours, headlines, per_sample
from mllm.evaluate.report.figure import FAINT, INK, LINE, STYLE
from mllm.evaluate.report.story import COLOURS, STAGE_COLOURS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH, HEIGHT = 15.0, 10.2  # inches
SHAPES = ((3, 4), (1, 1), (4, 3), (16, 9))
"""Widths and heights that a line is drawn for."""


def draw_figure(title: str, numbers: Numbers, path: Path) -> None:
    """Draw into the PNG `path`."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, HEIGHT), dpi=110)
        FigureCanvasAgg(figure)
        figure.text(0.045, 0.962, title, fontsize=21, fontweight="bold", va="center", parse_math=False)
        _headline(figure, numbers)
        places: Any = figure.subplots(2, 3)
        figure.subplots_adjust(left=0.055, right=0.975, top=0.79, bottom=0.06, wspace=0.22, hspace=0.36)
        (lengths, learned, fill), (sizes, images, sources) = places
        _lengths(lengths, numbers)
        _learned(learned, numbers)
        _fill(fill, numbers)
        _sizes(sizes, numbers)
        _images(images, numbers)
        _sources(sources, numbers)
        figure.savefig(path)


def _headline(figure: Figure, numbers: Numbers) -> None:
    for at, ((number, name, note), colour) in enumerate(zip(headlines(numbers), _hues(), strict=False)):
        x = 0.045 + 0.19 * at
        figure.text(x, 0.895, number, fontsize=21, color=colour, va="baseline")
        figure.text(x, 0.873, name, fontsize=10, fontweight="bold", va="baseline")
        figure.text(x, 0.852, note, fontsize=8, color=FAINT, va="baseline")


def _hues() -> list[str]:
    """One a headline, the colour of the charts that belong to it."""
    return [INK, COLOURS[1], COLOURS[0], STAGE_COLOURS[0], COLOURS[2]]


def _titled(axes: Axes, title: str, x: str = "", y: str = "samples") -> None:
    axes.set_title(title, loc="left", fontsize=12, fontweight="bold")
    axes.set_xlabel(x)
    axes.set_ylabel(y)


def _lengths(axes: Axes, numbers: Numbers) -> None:
    """A histogram, the sources on top of each other; where most lengths are small, per doubling."""
    told, unit = numbers["lengths"], numbers["unit"]
    edges, below = np.array(told["edges"], dtype=float), np.zeros(len(told["edges"]) - 1)
    for counts, colour in zip(told["counts"], colours(len(told["counts"])), strict=True):
        heights = np.array(counts) / _widths(edges, told["is_log"])
        axes.bar(edges[:-1], heights, np.diff(edges), below, align="edge", color=colour)
        below += heights
    if told["is_log"]:
        _doublings(axes.xaxis, edges)
    median, most = (told["quantiles"][key] for key in ("50", "99"))
    for row, (value, name) in enumerate(((median, "median"), (most, "99 %"))):
        axes.axvline(value, color=INK, linewidth=0.9, linestyle=(0, (2, 3)))
        _note(axes, value, 0.99 - 0.07 * row, f"{name} {value:,}")
    axes.set_xlim(edges[0], edges[-1])
    axes.set_ylim(0, max(float(below.max()) * 1.12, 1e-9))
    _titled(axes, f"Length in {unit}", f"{unit} a sample", "samples a doubling" if told["is_log"] else "samples")
    axes.yaxis.set_major_formatter(_count)


def _note(axes: Axes, x: float, y: float, text: str, right: bool = False) -> None:
    """Small words beside a line, at a share of the height; left of it where there is no room on the right."""
    side: Any = {"ha": "right"} if right else {}
    text = f"{text} " if right else f" {text}"
    axes.text(x, y, text, transform=axes.get_xaxis_transform(), fontsize=8, color=FAINT, va="top", **side)


def _widths(edges: Any, is_log: bool) -> Any:
    """What a bar's count is divided by, so that bars of different widths can be compared."""
    return np.diff(np.log2(edges)) if is_log else np.ones(len(edges) - 1)


def _doublings(axis: Any, edges: Any) -> None:
    axis.axes.set_xscale("log", base=2) if axis.axis_name == "x" else axis.axes.set_yscale("log", base=2)
    powers = np.arange(np.floor(np.log2(max(edges[0], 1))), np.ceil(np.log2(edges[-1])) + 1)
    axis.set_ticks(2 ** powers[:: max(1, len(powers) // 7)])
    axis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axis.set_minor_locator(_no_ticks())


def _no_ticks() -> Any:
    from matplotlib.ticker import NullLocator

    return NullLocator()


def _count(value: float, _: Any) -> str:
    return f"{value / 1000:,.0f} k" if value >= 10_000 else f"{value:,.0f}"


def _learned(axes: Axes, numbers: Numbers) -> None:
    counts = numbers["supervised_shares"]
    axes.bar(np.arange(10) / 10 + 0.05, counts, 0.092, color=STAGE_COLOURS[0])
    mean = numbers["supervised_share"]
    axes.axvline(mean, color=INK, linewidth=0.9, linestyle=(0, (2, 3)))
    _note(axes, mean, 0.99, f"of all: {mean:.1%}", right=mean > 0.7)
    axes.set_xlim(0, 1)
    axes.set_ylim(0, max(counts) * 1.12)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes.yaxis.set_major_formatter(_count)
    _titled(axes, "Share that is learned", f"share of a sample's {numbers['unit']}")


def _fill(axes: Axes, numbers: Numbers) -> None:
    """The share of a row that holds tokens, for each length of row; the area is what would be cut."""
    told = numbers["fill"]
    if not told:
        return _nothing(axes, "Fill of rows", "needs a tokenizer: give --llm or --config")
    rows = told["seq_length"]
    axes.fill_between(rows, told["cut"], color=COLOURS[5], alpha=0.25, linewidth=0, label="samples that are cut")
    axes.plot(rows, told["fill"], color=COLOURS[2], linewidth=2, label="real tokens")
    places = {told["best"]: f"best {told['best']:,}"}
    if told["chosen"]:
        places.setdefault(told["chosen"], f"chosen {told['chosen']:,}")
    for number, (row, name) in enumerate(places.items()):
        share = told["fill"][rows.index(row)]
        axes.axvline(row, color=INK, linewidth=0.9, linestyle=(0, (2, 3)))
        axes.plot([row], [share], "o", color=COLOURS[2], markersize=6)
        _note(axes, row, 0.42 - 0.07 * number, f"{name}: {share:.1%}", right=row > (rows[0] + rows[-1]) / 2)
    axes.set_ylim(0, 1.02)
    axes.set_xlim(rows[0], rows[-1])
    axes.locator_params(axis="x", nbins=5)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    _titled(axes, "Fill of rows", "seq_length", "")
    axes.legend(fontsize=8, loc="lower right")


def _sizes(axes: Axes, numbers: Numbers) -> None:
    """How many images have which width and height: darker is more."""
    told = numbers["image_sizes"]
    if not told["edges"]:
        return _nothing(axes, "Image sizes", "no images")
    from matplotlib.colors import LinearSegmentedColormap, LogNorm

    edges, counts = np.array(told["edges"]), np.array(told["counts"], dtype=float)
    shades = LinearSegmentedColormap.from_list("", ["#e9e2f4", COLOURS[1], "#2f1650"])
    norm = LogNorm(1, max(counts.max(), 2))
    axes.pcolormesh(edges, edges, np.ma.masked_equal(counts.T, 0), cmap=shades, norm=norm, linewidth=0)
    _doublings(axes.xaxis, edges)
    _doublings(axes.yaxis, edges)
    for width, height in SHAPES:
        ends = [side * height / width for side in (edges[0], edges[-1])]
        axes.plot([edges[0], edges[-1]], ends, color=FAINT, linewidth=0.6, alpha=0.5)
    axes.set_xlim(edges[0], edges[-1])
    axes.set_ylim(edges[0], edges[-1])
    axes.grid(True, axis="both", color=LINE)
    median = " x ".join(f"{told[side]['quantiles']['50']:,}" for side in ("width", "height"))
    lines = ", ".join(f"{width}:{height}" for width, height in SHAPES)
    _titled(axes, "Image sizes", f"width; the median is {median}; lines: {lines}", "height")


def _images(axes: Axes, numbers: Numbers) -> None:
    told = per_sample(numbers)
    axes.bar([name for name, _ in told], [count for _, count in told], 0.7, color=COLOURS[1])
    for at, (_, count) in enumerate(told):
        axes.annotate(
            f"{count / numbers['samples']:.1%}",
            (at, count),
            (0, 3),
            textcoords="offset points",
            fontsize=8,
            color=FAINT,
            ha="center",
        )
    axes.set_ylim(0, max(count for _, count in told) * 1.12)
    axes.set_xlim(-0.6, max(len(told), 4) - 0.4)
    axes.yaxis.set_major_formatter(_count)
    _titled(axes, "Images in a sample", "images")


def _sources(axes: Axes, numbers: Numbers) -> None:
    """Of each source its share of the samples and of the length."""
    told = bars_of(numbers)[:10]
    for at, ((name, samples, length, learned), colour) in enumerate(
        zip(told, colours(len(numbers["sources"])), strict=False)
    ):
        axes.barh(at - 0.17, samples, 0.3, color=colour)
        axes.barh(at + 0.17, length, 0.3, color=colour, alpha=0.45)
        note = f"{samples:.1%} and {length:.1%}; {learned:.0%} learned"
        axes.annotate(
            _cut(name), (0, at - 0.36), (1, 1), textcoords="offset points", fontsize=9, va="bottom", parse_math=False
        )
        axes.annotate(
            note,
            (1.02, at - 0.36),
            (0, 1),
            textcoords="offset points",
            fontsize=8,
            color=FAINT,
            va="bottom",
            ha="right",
        )
    axes.set_ylim(max(len(told), 4) - 0.4, -0.7)
    axes.set_xlim(0, 1.02)
    axes.set_yticks([])
    axes.grid(True, axis="x")
    axes.grid(False, axis="y")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    more = len(numbers["sources"]) - len(told)
    unit = numbers["unit"]
    _titled(axes, "Sources", f"dark: of the samples, light: of the {unit}" + (f"; {more} more" if more else ""), "")


def _cut(name: str) -> str:
    return name if len(name) <= 19 else f"{name[:9]}…{name[-9:]}"


def _nothing(axes: Axes, title: str, why: str) -> None:
    _titled(axes, title, "", "")
    axes.set(xticks=[], yticks=[])
    axes.text(0.5, 0.5, why, transform=axes.transAxes, ha="center", va="center", color=FAINT)
