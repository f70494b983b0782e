"""Small charts as inline SVG, sharp at any size and coloured by the page's own style.

Enters: edges and counts. Leaves: `<svg>` elements. Every shape tells its numbers to whoever points at it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise

WIDTH, HEIGHT, LEFT, BOTTOM, TOP = 560, 250, 52, 34, 14
Mark = tuple[float, str]
"""A place on the x axis and its name."""


@dataclass(frozen=True)
class Frame:
    """From values to places on the drawing."""

    x: tuple[float, float]
    y: tuple[float, float]
    log_x: bool = False
    log_y: bool = False

    def at(self, x: float, y: float) -> tuple[float, float]:
        across, up = along(x, self.x, self.log_x), along(y, self.y, self.log_y)
        return LEFT + across * (WIDTH - LEFT - 8), TOP + (1 - up) * (HEIGHT - TOP - BOTTOM)

    def box(self, left: float, right: float, low: float, high: float) -> str:
        """The attributes of a rectangle between values."""
        (x0, y1), (x1, y0) = self.at(left, low), self.at(right, high)
        return f'x="{x0:.1f}" y="{y0:.1f}" width="{max(x1 - x0 - 0.5, 0.5):.1f}" height="{max(y1 - y0, 0):.1f}"'


def along(value: float, ends: tuple[float, float], is_log: bool) -> float:
    low, high = (math.log2(max(end, 1e-9)) for end in ends) if is_log else ends
    return ((math.log2(max(value, 1e-9)) if is_log else value) - low) / ((high - low) or 1)


def svg(label: str, parts: Sequence[str]) -> str:
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label)}">{"".join(parts)}</svg>'


def stacked(
    edges: Sequence[float],
    stacks: Sequence[tuple[str, str, Sequence[int]]],
    is_log: bool,
    unit: str,
    marks: Sequence[Mark],
) -> str:
    """A histogram of (name, colour, counts), one on top of the other; logarithmic ones per doubling."""
    widths = [math.log2(b / a) if is_log else 1.0 for a, b in pairwise(edges)]
    heights = [[count / width for count, width in zip(counts, widths, strict=True)] for _, _, counts in stacks]
    top = max((sum(column) for column in zip(*heights, strict=True)), default=0) * 1.1 or 1
    frame = Frame((edges[0], edges[-1]), (0, top), is_log)
    parts, below = grid(frame, count), [0.0] * len(widths)
    for (name, colour, counts), tall in zip(stacks, heights, strict=True):
        parts.append(f'<g fill="{colour}">')
        for bar, height in enumerate(tall):
            if height:
                hint = f"{name}: {counts[bar]:,} of {edges[bar]:,} to {edges[bar + 1] - 1:,} {unit}"
                box = frame.box(edges[bar], edges[bar + 1], below[bar], below[bar] + height)
                parts.append(f"<rect {box}><title>{escape(hint)}</title></rect>")
                below[bar] += height
        parts.append("</g>")
    return svg(f"length in {unit}", [*parts, *marked(frame, marks)])


def columns(bars: Sequence[tuple[str, int]], colour: str, label: str) -> str:
    """A bar for each name, with its share above it."""
    total = sum(number for _, number in bars) or 1
    frame = Frame((-0.6, max(len(bars), 4) - 0.4), (0, max(number for _, number in bars) * 1.15 or 1))
    parts = grid(frame, count, x=False)
    for at, (name, number) in enumerate(bars):
        x, y = frame.at(at, number)
        parts.append(f'<rect fill="{colour}" {frame.box(at - 0.35, at + 0.35, 0, number)}>')
        parts.append(f"<title>{escape(name)}: {number:,}</title></rect>")
        parts.append(f'<text x="{x:.1f}" y="{y - 4:.1f}" text-anchor="middle">{number / total:.1%}</text>')
        parts.append(f'<text x="{x:.1f}" y="{HEIGHT - 16}" text-anchor="middle">{escape(name)}</text>')
    return svg(label, parts)


def curve(x: Sequence[int], y: Sequence[float], area: Sequence[float], colour: str, marks: Sequence[Mark]) -> str:
    """Shares over a length, and a second share as an area."""
    frame = Frame((x[0], x[-1]), (0, 1.05))
    parts = grid(frame, lambda value: f"{value:.0%}")
    floor = [frame.at(x[0], 0), *(frame.at(a, b) for a, b in zip(x, area, strict=True)), frame.at(x[-1], 0)]
    parts.append(f'<polygon class="cut" points="{points(floor)}"/>')
    line = points(frame.at(a, b) for a, b in zip(x, y, strict=True))
    parts.append(f'<path style="--hue:{colour}" d="M{line}"/>')
    for row, name in marks:
        place, share = frame.at(row, y[x.index(int(row))]), y[x.index(int(row))]
        parts.append(f'<circle cx="{place[0]:.1f}" cy="{place[1]:.1f}" r="4" fill="{colour}">')
        parts.append(f"<title>{name}: {share:.1%}</title></circle>")
    return svg("fill of rows", [*parts, *marked(frame, marks, down=60)])


def heat(edges: Sequence[float], counts: Sequence[Sequence[int]], colour: str) -> str:
    """How many images have which width and height: darker is more."""
    frame = Frame((edges[0], edges[-1]), (edges[0], edges[-1]), log_x=True, log_y=True)
    most = max(max(column) for column in counts)
    parts = [*grid(frame, count), f'<g fill="{colour}">']
    for at, column in enumerate(counts):
        for up, number in enumerate(column):
            if number:
                shade = 0.15 + 0.85 * (math.log(number) / math.log(most) if most > 1 else 1)
                box = frame.box(edges[at], edges[at + 1], edges[up], edges[up + 1])
                hint = f"{number:,} of about {edges[at]:.0f} x {edges[up]:.0f}"
                parts.append(f'<rect {box} opacity="{shade:.2f}"><title>{hint}</title></rect>')
    start, end = frame.at(edges[0], edges[0]), frame.at(edges[-1], edges[-1])
    parts.append(
        f'</g><line class="axis" x1="{start[0]:.1f}" y1="{start[1]:.1f}" x2="{end[0]:.1f}" y2="{end[1]:.1f}"/>'
    )
    return svg("image sizes", parts)


def points(places: Iterator[tuple[float, float]] | Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in places)


def grid(frame: Frame, name: Callable[[float], str], x: bool = True) -> list[str]:
    """Lines and values of the y axis, values of the x axis."""
    parts = []
    for value in ticks(*frame.y, frame.log_y):
        _, y = frame.at(frame.x[0], value)
        parts.append(f'<line class="axis" x1="{LEFT}" x2="{WIDTH - 8}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{name(value)}</text>')
    for value in ticks(*frame.x, frame.log_x) if x else ():
        across, _ = frame.at(value, frame.y[0])
        parts.append(f'<text x="{across:.1f}" y="{HEIGHT - 16}" text-anchor="middle">{count(value)}</text>')
    return parts


def ticks(low: float, high: float, is_log: bool) -> list[float]:
    """Round values: powers of two, or steps of 1, 2 or 5."""
    if is_log:
        powers = list(range(math.ceil(math.log2(max(low, 1e-9)) - 1e-9), math.floor(math.log2(high) + 1e-9) + 1))
        return [2.0**power for power in powers[:: max(1, len(powers) // 7)]]
    rough = (high - low) / 4 or 1
    size = 10.0 ** math.floor(math.log10(rough))
    step = next(size * factor for factor in (1, 2, 5, 10) if size * factor >= rough)
    first = math.ceil(low / step)
    return [step * n for n in range(first, math.floor(high / step + 1e-9) + 1)]


def count(value: float) -> str:
    """A value of an axis."""
    if value >= 10_000:
        return f"{value / 1000:,.0f} k"
    return f"{value:,.0f}" if value == round(value) else f"{value:g}"


def marked(frame: Frame, marks: Sequence[Mark], down: int = 8) -> list[str]:
    """A dotted line and a name for each mark, the names below each other, the first so far below the top."""
    parts = []
    for number, (value, name) in enumerate(marks):
        x, y = frame.at(value, frame.y[1])
        near_end = x > WIDTH * 0.7
        anchor, shift = ("end", -4) if near_end else ("start", 4)
        parts.append(f'<line class="mark" x1="{x:.1f}" x2="{x:.1f}" y1="{y:.1f}" y2="{HEIGHT - BOTTOM}"/>')
        parts.append(f'<text x="{x + shift:.1f}" y="{y + down + 13 * number:.1f}" text-anchor="{anchor}">{name}</text>')
    return parts
