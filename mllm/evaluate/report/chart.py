"""Loss curves as an inline SVG, sharp at any size and coloured by the page's own style.

Enters: the curves of the stages. Leaves: the `<svg>` element. Both axes are drawn by hand: it is forty lines.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from html import escape
from itertools import cycle

from mllm.evaluate.report.story import STAGE_COLOURS, Curve

WIDTH, HEIGHT, LEFT, BOTTOM = 1000, 260, 46, 24
LEAST_LOSS = 1e-6
"""A loss of zero has no logarithm."""


def loss_chart(curves: list[Curve]) -> str:
    """The stages one after the other on a logarithmic axis: the losses faint, their running mean on top."""
    losses = [max(loss, LEAST_LOSS) for curve in curves for loss in curve.loss] or [1.0]
    low, high = math.log10(min(losses)) - 0.05, math.log10(max(losses)) + 0.05
    last = max(1, sum(max(curve.steps, default=0) for curve in curves))

    def place(step: float, loss: float) -> tuple[float, float]:
        share = (math.log10(max(loss, LEAST_LOSS)) - low) / (high - low)
        return LEFT + step / last * (WIDTH - LEFT), (1 - share) * (HEIGHT - BOTTOM)

    parts, start = _grid(low, high, place), 0
    for curve, hue in zip(curves, cycle(STAGE_COLOURS), strict=False):
        parts += _stage(curve, hue, start, place)
        start += max(curve.steps, default=0)
    parts.append(f'<text x="{WIDTH}" y="{HEIGHT - 6}" text-anchor="end">step {start:,}</text>')
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="loss">{"".join(parts)}</svg>'


Place = Callable[[float, float], tuple[float, float]]


def _grid(low: float, high: float, place: Place) -> list[str]:
    """A line and its value at 1, 2 and 5 of each decade."""
    ticks = [digit * 10.0**power for power in range(math.floor(low), math.ceil(high)) for digit in (1, 2, 5)]
    parts = []
    for tick in ticks:
        if low <= math.log10(tick) <= high:
            _, y = place(0, tick)
            parts.append(f'<line class="axis" x1="{LEFT}" x2="{WIDTH}" y1="{y:.1f}" y2="{y:.1f}"/>')
            parts.append(f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{tick:g}</text>')
    return parts


def _stage(curve: Curve, hue: str, start: int, place: Place) -> list[str]:
    x, _ = place(start, 1.0)
    return [
        f'<g style="--hue:{hue}"><path class="raw" d="{_line(curve.steps, curve.loss, start, place)}"/>',
        f'<path d="{_line(curve.steps, curve.smooth, start, place)}"/>',
        f'<text class="name" x="{x + 4:.1f}" y="{HEIGHT - 6}">{escape(curve.name)}</text></g>',
    ]


def _line(steps: list[int], losses: list[float], start: int, place: Place) -> str:
    points = (place(start + step, loss) for step, loss in zip(steps, losses, strict=True))
    return "M" + " ".join(f"{x:.1f},{y:.1f}" for x, y in points) if steps else ""
