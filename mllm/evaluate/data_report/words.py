"""The few sentences that page and picture share.

Enters: the numbers of `mllm.data.curation.statistics`. Leaves: headlines and labels.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import cycle, islice
from typing import Any

from mllm.evaluate.report.story import COLOURS

GREY = "#9aa1ab"
SHOWN = 6
"""Sources that have a colour of their own; the others share one."""
Numbers = Mapping[str, Any]


def headlines(numbers: Numbers) -> list[tuple[str, str, str]]:
    """(number, name, note) of what matters most."""
    lengths, unit = numbers["lengths"], numbers["unit"]
    told = [
        (short(numbers["samples"]), "samples", bad(numbers)),
        (short(numbers["images"]), "images", f"{numbers['images'] / numbers['samples']:.2f} a sample"),
        (short(numbers["length"]), unit, f"{lengths['mean']:,.0f} a sample, at most {lengths['max']:,}"),
        (f"{numbers['supervised_share']:.1%}", f"{unit} learned", f"{short(numbers['supervised'])} in all"),
    ]
    fill = numbers["fill"]
    if fill:
        advised = dict(zip(fill["seq_length"], fill["fill"], strict=True))
        note = f"{advised[fill['best']]:.1%} full"
        if fill["chosen"]:
            note += f"; {fill['chosen']:,}: {advised[fill['chosen']]:.1%}"
        told.append((f"{fill['best']:,}", "best seq_length", note))
    return told


def bad(numbers: Numbers) -> str:
    """What was read and is no sample."""
    faults, filtered = sum(numbers["faults"].values()), sum(numbers["filtered"].values())
    parts = [f"{faults:,} unreadable"] * bool(faults) + [f"{filtered:,} left out"] * bool(filtered)
    return ", ".join(parts) or "all that were read"


def short(number: int) -> str:
    """1234567 -> 1.23 M."""
    for size, letter in ((10**9, "G"), (10**6, "M"), (10**4, "k")):
        if number >= size:
            value = number / (1000 if letter == "k" else size)
            return f"{value:.3g} {letter}" if value < 1000 else f"{value:,.0f} {letter}"
    return f"{number:,}"


def colours(count: int) -> list[str]:
    """A colour a source."""
    own = [colour for colour in COLOURS if colour != GREY]
    return [*islice(cycle(own), min(count, SHOWN)), *[GREY] * max(0, count - SHOWN)]


def bars_of(numbers: Numbers) -> list[tuple[str, float, float, float]]:
    """(source, share of samples, share of length, learned share)."""
    keys = ("share_of_samples", "share_of_length", "supervised_share")
    return [(line["name"], *(line[key] for key in keys)) for line in numbers["sources"]]


def per_sample(numbers: Numbers) -> list[tuple[str, int]]:
    """(number of images, samples), the many of a long tail in one."""
    counts = [(int(number), count) for number, count in numbers["images_per_sample"].items()]
    if len(counts) <= 9:
        return [(str(number), count) for number, count in counts]
    first = counts[:8]
    return [(str(number), count) for number, count in first] + [
        (f"{counts[8][0]}+", sum(count for _, count in counts[8:]))
    ]
