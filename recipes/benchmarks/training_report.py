"""The numbers of `train` as tables.

Enters: what `training.measure` found. Leaves: a row for each configuration with its rate, its share of what the device
can do, its memory and how it compares with the one beside it; and where the time of a step goes.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from typing import Any

from rich.table import Table

from benchmarks.counted import ASKED
from benchmarks.naive import BATCH
from benchmarks.planning import NO_TIME
from benchmarks.stopwatch import ROOMS

GIB = 2**30
HEADS = ("", "", "tokens/s", "p10 - p90", "on the mix", "MFU", "of ceiling", "peak GiB", "fill", "beside", "floor")
FLOORS = {"B4 0.5B": 110_000, "B4 1.5B": 55_000, "B4 3B": 31_000, "B4 7B": 16_500, "S2 7B": 14_500, "S2 1.5B": 42_000}
"""Real tokens a second that an H200 shall reach."""
Cells = list[str]


def lines(found: dict[str, Any]) -> list[Cells]:
    """The cells under `HEADS`, configuration by configuration."""
    late = unmeasured(found)
    return [line(name, row, found) for name, row in found["rows"].items() if name not in late]


def unmeasured(found: dict[str, Any]) -> list[str]:
    """Configurations for which no time was left."""
    return [name for name, row in found["rows"].items() if row.get("error", "").startswith(NO_TIME)]


STRAGGLES = 2.5
"""Times the median of its row that a step takes for a position, from which on it is told."""


def stragglers(found: dict[str, Any]) -> list[str]:
    """Rows in which a timed step took far longer than the others for what it computed: by chance, for all we know, and
    then medians are to be believed, not sums."""
    told = []
    for name, row in found["rows"].items():
        each = row.get("each", {"seconds": [], "positions": []})
        paces = [seconds / positions for seconds, positions in zip(each["seconds"], each["positions"], strict=True)]
        if slow := sum(pace > STRAGGLES * statistics.median(paces) for pace in paces):
            told.append(f"{name} ({slow} of {len(paces)})")
    return told


def remarks(found: dict[str, Any]) -> str:
    """What must be known to read the table."""
    late, slow = unmeasured(found), stragglers(found)
    words = f" No time was left for {', '.join(late)}." if late else ""
    return words + (f" Steps far slower than the median: {', '.join(slow)}." if slow else "")


def line(name: str, row: dict[str, Any], found: dict[str, Any]) -> Cells:
    if "error" in row:
        return [name, row["words"], row["error"].splitlines()[0][:60], *[""] * (len(HEADS) - 3)]
    return [
        name,
        row["words"] + smaller(row),
        f"{row['tokens_per_second']:,.0f}",
        f"{row['tokens_per_second_p10']:,.0f} - {row['tokens_per_second_p90']:,.0f}",
        f"{row['tokens_per_second_mix']:,.0f}",
        f"{row['mfu']:.1%}",
        f"{row['flops_per_second'] / found['ceiling']:.1%}",
        f"{row['peak_memory'] / GIB:.1f}",
        f"{row['fill']:.1%}",
        beside(row, found),
        floor(name, row, found),
    ]


def smaller(row: dict[str, Any]) -> str:
    """What memory did not suffice for at full size."""
    if row.get("batch", BATCH) < BATCH:
        return f", batch {row['batch']}"
    return ", micro-batches of 1/{:g}".format(1 / row["part"]) if row.get("part", 1) < 1 else ""


def beside(row: dict[str, Any], found: dict[str, Any]) -> str:
    """How many times as fast as the configuration that it is compared with, on the whole mix; by medians of the timed
    steps too where that one pads."""
    ratios = compared(row, found)
    if not ratios:
        return ""
    by_medians = f", {ratios['median']:.2f} by medians" if "batch" in found["rows"][row["beside"]] else ""
    return f"{ratios['mix']:.2f} x {row['beside']}{by_medians}"


def compared(row: dict[str, Any], found: dict[str, Any]) -> dict[str, float]:
    """Its rate / that of the row beside it: carried to the whole mix, tokens over time of the timed steps, medians."""
    other = found["rows"].get(row["beside"], {})
    if "tokens_per_second" not in row.keys() & other.keys():
        return {}
    ways = {"mix": "tokens_per_second_mix", "mean": "tokens_per_second_mean", "median": "tokens_per_second"}
    return {way: row[name] / other[name] for way, name in ways.items()}


def floor(name: str, row: dict[str, Any], found: dict[str, Any]) -> str:
    """What an H200 shall reach at least, and whether it does."""
    if name not in FLOORS or "H200" not in found["machine"].get("gpu", ""):
        return ""
    met = row["tokens_per_second"] >= FLOORS[name]
    return f"[green]{FLOORS[name]:,} met[/]" if met else f"[red]{FLOORS[name]:,} missed[/]"


def room_lines(found: dict[str, Any]) -> list[Cells]:
    """Milliseconds of a step, room by room, and what should not be: waits for the device, late compilation."""
    return [
        [
            name,
            f"{1000 * row['step_seconds']:.1f}",
            *(f"{1000 * row['rooms'].get(room, 0):.1f}" for room in ROOMS),
            f"{row['syncs_per_step']:g}",
            str(row["recompiled"]),
        ]
        for name, row in found["rows"].items()
        if "error" not in row
    ]


ROOM_HEADS = ("ms a step", "all", *ROOMS, "syncs", "recompiled")


RATIOS = {
    "ours_over_bare": ("our loop with its loader / a bare loop without", "at most 1.05"),
    "padded_over_packed": ("padded / packed, a real token", "at least 1.2"),
    "all_logits_over_supervised": ("all logits / those of supervised rows", "at least 1.03"),
    "peft_over_fast_lora": ("LoRA in bfloat16, by peft / ours", ""),
}
"""What each ratio compares, and what is asked of it."""
RATIO_HEADS = ("CPU time", "median", "pairs from - to", "asked for")


def ratio_lines(found: dict[str, Any]) -> list[Cells]:
    """The cells under `RATIO_HEADS`."""
    shown = {name: found["ratios"][name] for name in RATIOS if name in found["ratios"]}
    return [
        [words, f"{shown[name]['median']:.2f}", f"{shown[name]['least']:.2f} - {shown[name]['greatest']:.2f}", asked]
        for name, (words, asked) in RATIOS.items()
        if name in shown
    ]


def ratio_table(found: dict[str, Any]) -> Table:
    """For the screen."""
    return screen(f"the small model on this CPU, {found['ratios']['pairs']} pairs", RATIO_HEADS, ratio_lines(found))


def count_table(found: dict[str, Any]) -> Table:
    """For the screen."""
    rows = [[words, f"{found['counters'][name]:.3f}", asked] for name, (words, asked) in ASKED.items()]
    return screen("counted", ("counted", "", "asked for"), rows)


def rate_table(found: dict[str, Any]) -> Table:
    """For the screen."""
    table = screen("stage 1 and 2: real tokens a second", HEADS, lines(found))
    table.caption = remarks(found).strip() or None
    return table


def room_table(found: dict[str, Any]) -> Table:
    """For the screen."""
    return screen("where the time goes", ROOM_HEADS, room_lines(found))


def screen(title: str, heads: Iterable[str], rows: Iterable[Cells]) -> Table:
    table = Table(*heads, title=title, title_justify="left")
    for row in rows:
        table.add_row(*row)
    return table
