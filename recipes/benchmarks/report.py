"""Numbers as a table for people, and what machine they were measured on.

Enters: what a benchmark measured. Leaves: a table with the targets beside the numbers, met or missed.
"""

from __future__ import annotations

import os
import platform
import shlex
import sys
import time
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

TARGETS = {"loader_vs_plain": 0.95, "loader_vs_webdataset": 1.0, "packer_samples_per_s": 50_000, "fill": 0.995}
"""What the data engine promises, at least."""
LIBRARIES = ("torch", "pillow", "numpy", "tokenizers", "transformers", "accelerate", "peft", "trl", "webdataset")
LOADING = (
    ("loader", "loader_vs_plain", "loader", "plain loop"),
    ("loader, tars", "loader_vs_webdataset", "loader on tars", "webdataset"),
    ("index", "index_vs_plain", "index", "plain count"),
)
"""Title, name of the ratio, and of its two sides."""
PACKERS = (
    ("first fit\ndecreasing", "fill_first_fit_decreasing"),
    ("nanoVLM's\nknapsack", "fill_balanced_knapsack"),
    ("its window\nof 64 rows", "fill_balanced_knapsack_64_rows"),
)
"""Heads of the columns; first fit sees the whole set, the knapsack its default window of 8 rows."""


def rate_table(found: dict[str, Any]) -> Table:
    """How fast the data engine is; rates are samples a second of CPU time."""
    table = Table("samples a second of CPU", "ours", "beside", "ratio (range)", "target")
    rates = found["samples_per_s"]
    for title, name, mine, other in LOADING:
        ratio = "{:.2f} ({:.2f} to {:.2f})".format(found[name], *found["ranges"][name])
        table.add_row(title, f"{rates[mine]:,.0f}", f"{other} {rates[other]:,.0f}", ratio, kept(found, name))
    packer = found["packer_samples_per_s"]
    table.add_row("packer, slowest mix", f"{packer:,.0f}", "", "", kept(found, "packer_samples_per_s"))
    return table


def fill_table(found: dict[str, Any]) -> Table:
    """How full the rows are, mix by mix, beside other packers."""
    table = Table("fill of the rows", "ours", *(title for title, _ in PACKERS), "target")
    for name, fill in found["fill"].items():
        others = [f"{found[way][name]:.1%}" for _, way in PACKERS]
        table.add_row(name, f"{fill:.2%}", *others, kept({"fill": fill}, "fill"))
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
        "date": time.strftime("%Y-%m-%d"),
        "command": "python recipes/benchmark.py " + shlex.join(without_json(sys.argv[1:])),
        "system": platform.platform(),
        "python": platform.python_version(),
        **accelerator(),
        **{name: installed(name) for name in LIBRARIES},
    }


def without_json(arguments: Sequence[str]) -> list[str]:
    """Where the numbers are written to is nobody else's business."""
    kept = list(arguments)
    if "--json" in kept:
        place = kept.index("--json")
        del kept[place : place + 2]
    return kept


def installed(name: str) -> str:
    """The version of a package; nothing where it is missing."""
    try:
        return version(name)
    except PackageNotFoundError:
        return ""


def accelerator() -> dict[str, str]:
    """The GPU, where there is one."""
    if not torch.cuda.is_available():
        return {}
    return {"gpu": torch.cuda.get_device_name(), "cuda": str(torch.version.cuda), "triton": installed("triton")}


def processor_name() -> str:
    """As the system tells it."""
    told = Path("/proc/cpuinfo")
    lines = told.read_text().splitlines() if told.exists() else []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())
