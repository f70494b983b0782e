"""Does the model look? The held-out loss with the right images, with those of other samples, and with blank ones.

Enters: for each sample its summed losses under the three. Leaves: means per supervised token, and how sure the gap
between right and wrong images is. A model that reads its images does worse when they are wrong; where there is no gap,
the images do not reach it, or it ignores them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

LEAST_GAP = 0.01
"""A share of the loss: a smaller gap is none, however sure."""
STANDARD_ERRORS = 2.0
"""A gap within so many of them may be chance."""


@dataclass(frozen=True)
class HeldOutLoss:
    """Mean losses per supervised token of all held-out samples; without the last three where no two samples have
    different images."""

    loss: float
    shuffled: float | None = None
    blank: float | None = None
    looks: bool | None = None
    """Whether there is a gap; None where that cannot be told: fewer than two samples with images, no finite loss."""

    @property
    def gap(self) -> float | None:
        """How much worse the model does with the wrong images."""
        return None if self.shuffled is None else self.shuffled - self.loss

    def numbers(self) -> dict[str, float]:
        """For the line of a step."""
        told = {"loss": self.loss, "shuffled": self.shuffled, "blank": self.blank, "gap": self.gap}
        return {name: value for name, value in told.items() if value is not None}


def terms(tokens: Tensor, right: Tensor, shuffled: Tensor, blank: Tensor, changed: Tensor) -> list[float]:
    """What `conclude` needs, as sums over samples: those of all ranks add up. Each [samples] float64, `changed` bool:
    whether the images of a sample are other ones when they are shuffled."""
    paired = changed & (tokens > 0)
    t, r, d = tokens[paired], right[paired], (shuffled - right)[paired]
    sums = [tokens, right, shuffled, blank, paired, t, r, d, d * d, d * t, t * t]
    return [float(each.sum()) for each in sums]


def conclude(summed: list[float]) -> HeldOutLoss:
    """The losses, and whether the gap is one: of the samples whose images changed, the mean change per token must be
    at least 1 % of their loss, and two standard errors from zero (of a ratio of sums over samples: its tokens stand or
    fall together)."""
    tokens, right, shuffled, blank, samples, t, r, d, dd, dt, tt = summed
    if not tokens or not samples:
        return HeldOutLoss(right / max(1.0, tokens))
    looks = None
    if samples > 1 and math.isfinite(right + d):
        gap = d / t
        scatter = max(0.0, dd - 2 * gap * dt + gap**2 * tt) * samples / (samples - 1)
        looks = gap >= LEAST_GAP * r / t and gap > STANDARD_ERRORS * math.sqrt(scatter) / t
    return HeldOutLoss(right / tokens, shuffled / tokens, blank / tokens, looks)
