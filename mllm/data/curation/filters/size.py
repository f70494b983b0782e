"""The sizes of a sample's images as three numbers.

Enters: width and height of each. Leaves: those of the worst image, since a sample is as good as its worst.
"""

from __future__ import annotations

from collections.abc import Sequence


def measure_sizes(sizes: Sequence[tuple[int, int]]) -> dict[str, float]:
    """The shortest and the longest side of any image, and the largest ratio of two sides; nothing without images."""
    if not sizes:
        return {}
    return {
        "min_side": min(map(min, sizes)),
        "max_side": max(map(max, sizes)),
        "aspect": round(max(max(size) / min(size) for size in sizes), 4),
    }
