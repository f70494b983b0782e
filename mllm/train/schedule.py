"""Learning rates as a pure function of the step, so that nothing of them needs saving.

Enters: the step, the number of steps, the warm-up's share. Leaves: the factor on every group's peak rate.
"""

from __future__ import annotations

import math
from typing import Literal

import torch

Schedule = Literal["cosine", "constant"]


def rate_factor(step: int, steps: int, warmup: float, schedule: Schedule) -> float:
    """Linear rise over the first `warmup` share of the steps, then a cosine to zero at `steps`, or a constant 1."""
    rise = math.ceil(warmup * steps)
    if step < rise:
        return (step + 1) / (rise + 1)
    if schedule == "constant":
        return 1.0
    return 0.5 * (1.0 + math.cos(math.pi * (step - rise) / max(1, steps - rise)))


def set_rates(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Give each group its share of its peak rate."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * factor


def rates(optimizer: torch.optim.Optimizer) -> dict[str, dict[str, float]]:
    """The rate of each part in this step, as the table has it; groups with a factor have that times it."""
    return {"learning_rate": {group["part"]: group["lr"] / group.get("scale", 1.0) for group in optimizer.param_groups}}
