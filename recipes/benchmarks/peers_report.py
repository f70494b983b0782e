"""The numbers of `peers` as tables.

Enters: what `peers.measure` found. Leaves: a row for each way, and what was asked of ours.
"""

from __future__ import annotations

from typing import Any

from rich.table import Table

TARGETS = {"bare": 0.95, "trainer": 1.5, "trl": 1.5}
"""Supervised tokens a CPU second of ours, at least so many times theirs."""
NAMES = {"ours": "ours", "bare": "bare PyTorch loop", "trainer": "transformers' Trainer", "trl": "TRL's SFTTrainer"}
HEADS = (
    "",
    "supervised tokens a CPU second",
    "ours / theirs (steps from - to)",
    "asked for",
    "memory for training, MiB",
    "final loss",
    "loss differs at most",
)
MIB = 2**20


def lines(found: dict[str, Any]) -> list[list[str]]:
    """The cells under `HEADS`, way by way; what is missing says so."""
    return [line(name, found) for name in NAMES]


def line(name: str, found: dict[str, Any]) -> list[str]:
    if name in found["missing"]:
        return [NAMES[name], f"not installed: {found['missing'][name]}", *[""] * (len(HEADS) - 2)]
    ratio = f"ours_vs_{name}"
    least, greatest = found["ranges"].get(ratio, (0, 0))
    return [
        NAMES[name],
        f"{found['supervised_tokens_per_cpu_second'][name]:,.0f}",
        f"{found[ratio]:.2f} ({least:.2f} - {greatest:.2f})" if name in TARGETS else "",
        kept(name, found),
        f"{found['training_bytes'][name] / MIB:,.0f}",
        f"{found['final_loss'][name]:.6f}",
        f"{found['loss_difference'][name]:.1e}" if name in TARGETS else "",
    ]


def kept(name: str, found: dict[str, Any]) -> str:
    """What was asked for, and whether it is so."""
    if name not in TARGETS:
        return ""
    return f"{TARGETS[name]} {'met' if found[f'ours_vs_{name}'] >= TARGETS[name] else 'missed'}"


def peers_table(found: dict[str, Any]) -> Table:
    """For the screen."""
    table = Table(*HEADS)
    for cells in lines(found):
        table.add_row(*(cells_in_colour(cell) for cell in cells))
    return table


def cells_in_colour(cell: str) -> str:
    colour = {"met": "green", "missed": "red"}.get(cell.rpartition(" ")[2])
    return f"[{colour}]{cell}[/]" if colour else cell.replace("[", r"\[")


def facts_table(found: dict[str, Any]) -> Table:
    """What was trained, and how busy the machine was."""
    table = Table("steps", "supervised tokens a step", "positions of a padded batch / its real tokens", "load")
    tokens, load = found["supervised_tokens"] / found["steps"], found["machine"]["load"][0]
    table.add_row(str(found["steps"]), f"{tokens:,.0f}", f"{found['padded_over_real']:.2f}", f"{load:.1f}")
    return table
