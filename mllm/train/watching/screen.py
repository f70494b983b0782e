"""The line of a step as numbers with names, and as words.

Enters: the numbers of a step, some of them in sections (`learning_rate`, `source_loss`, `held_out`). Leaves: one flat
mapping, which the trackers get, and one line with the same fields in the same order, which the screen shows.
"""

from __future__ import annotations

from typing import Any


def flat(line: dict[str, Any]) -> dict[str, float]:
    """`{"a": {"b": 1}}` -> `{"a/b": 1}`; what is no number is left out."""
    told: dict[str, float] = {}
    for name, value in line.items():
        if isinstance(value, dict):
            told |= {f"{name}/{key}": each for key, each in flat(value).items()}
        elif isinstance(value, int | float):
            told[name] = value
    return told


def sentence(line: dict[str, Any], last_step: int) -> str:
    """One line a step: every field of `metrics.jsonl`."""
    fields = [f"{name} {worded(name, value)}" for name, value in flat(line).items() if name != "step"]
    return f"step {line['step']}/{last_step}  " + "  ".join(fields)


def worded(name: str, value: float) -> str:
    """A number as people read it."""
    if name.startswith("learning_rate"):
        return f"{value:.2e}"
    if name == "peak_memory":
        return f"{value / 2**30:.2f} GiB"
    if name in ("data_wait", "fill", "mfu"):
        return f"{value:.1%}"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
