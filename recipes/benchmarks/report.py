"""Numbers as a table for people, and what machine they were measured on.

Enters: what a benchmark measured. Leaves: a table with the targets beside the numbers, met or missed.
"""

from __future__ import annotations

import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.table import Table

TARGETS = {"loader_vs_plain": 0.95, "loader_vs_webdataset": 1.0, "packer_samples_per_s": 50_000, "fill": 0.995}
"""What the data engine promises, at least."""
LIBRARIES = ("torch", "pillow", "numpy", "tokenizers", "transformers", "webdataset")
LOADING = (
    ("loader", "loader_vs_plain", "loader", "plain loop"),
    ("loader, tars", "loader_vs_webdataset", "loader on tars", "webdataset"),
    ("index", "index_vs_plain", "index", "plain count"),
)
"""Title, name of the ratio, and of its two sides."""
CAPTION = (
    "Rates are samples a second of CPU time. FFD: first-fit-decreasing over the whole set; knapsack: nanoVLM's, in "
    "windows of its default 8 rows, and of 64."
)
PACKERS = (
    ("FFD", "fill_first_fit_decreasing"),
    ("knapsack", "fill_balanced_knapsack"),
    ("of 64 rows", "fill_balanced_knapsack_64_rows"),
)


def data_table(found: dict[str, Any]) -> Table:
    """The data engine's numbers, a line each; rates are samples a second of CPU time."""
    table = Table("data engine", "ours", "beside", "ratio (range)", "target", caption=CAPTION, caption_justify="left")
    rates = found["samples_per_s"]
    for title, name, mine, other in LOADING:
        ratio = "{:.2f} ({:.2f} to {:.2f})".format(found[name], *found["ranges"][name])
        table.add_row(title, f"{rates[mine]:,.0f}/s", f"{other} {rates[other]:,.0f}/s", ratio, kept(found, name))
    packer = found["packer_samples_per_s"]
    table.add_row("packer, slowest mix", f"{packer:,.0f}/s", "", "", kept(found, "packer_samples_per_s"))
    for name, fill in found["fill"].items():
        others = [f"{title} {found[way][name]:.1%}" for title, way in PACKERS]
        table.add_row(f"fill, {name}", f"{fill:.2%}", ", ".join(others), "", kept({"fill": fill}, "fill"))
    return table


def kept(found: dict[str, Any], name: str) -> str:
    """The promise and whether it is kept; nothing where none was made."""
    if name not in TARGETS:
        return ""
    shown = f"{TARGETS[name]:.1%}" if name == "fill" else f"{TARGETS[name]:,}"
    return f"[green]{shown} met[/]" if found[name] >= TARGETS[name] else f"[red]{shown} missed[/]"


def machine() -> dict[str, Any]:
    """Processor, cores, load, versions."""
    return {
        "processor": processor_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "load": os.getloadavg(),
        "system": platform.platform(),
        "python": platform.python_version(),
        **{name: version(name) for name in LIBRARIES},
    }


def processor_name() -> str:
    """As the system tells it."""
    told = Path("/proc/cpuinfo")
    lines = told.read_text().splitlines() if told.exists() else []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())
