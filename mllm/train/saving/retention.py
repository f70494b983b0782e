"""Which checkpoints stay.

Enters: the folders of all checkpoints, the one that was just written. Leaves: the newest few and the best few; the
others are removed.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mllm.train.saving import durable

KEEP = 2
"""Checkpoints kept: the newest, and one more in case the disk spoils it."""
LOOKED_BACK = 50
"""Steps over which the training loss is averaged: of one step it says more about the rows than about the weights."""


def retain(
    found: list[Path], written: Path, keep_last: int, keep_best: int, spoilt: Callable[[Path], bool] = lambda _: False
) -> None:
    """Keep the newest `keep_last` and the best `keep_best` of `found`, which is sorted from old to new. What is newer
    than `written`, and what is known to be spoilt, was passed over when the run resumed, and counts for nothing."""
    ours = [path for path in found[: found.index(written) + 1] if not spoilt(path)]
    measured = [path for path in ours if math.isfinite(metric_of(path))]
    kept = {*ours[-keep_last:], *sorted(measured, key=metric_of)[:keep_best]}
    for path in found:
        if path not in kept:
            durable.remove(path)


def metric_of(path: Path) -> float:
    """What a checkpoint is judged by, infinite where that is not known."""
    try:
        metric = json.loads((path / "state.json").read_text()).get("metric")
    except (OSError, ValueError):  # an older one, which nobody has looked at, is spoilt
        return math.inf
    return math.inf if metric is None else float(metric)


def metric(lines: list[dict[str, Any]]) -> float | None:
    """What a checkpoint after the last of these lines of metrics is judged by: the newest held-out loss, or the mean
    training loss of the last steps where nothing is held out."""
    measured = [line["held_out"]["loss"] for line in lines if "loss" in line.get("held_out", {})]
    if measured:
        return float(measured[-1])
    losses = [line["loss"] for line in lines[-LOOKED_BACK:]]
    return sum(losses) / len(losses) if losses else None
