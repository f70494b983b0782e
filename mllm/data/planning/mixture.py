"""Mixture: how many records of each source an epoch draws, and how many each window of it, exactly.

Enters: the records of each source and the settings. Leaves: integers; no coin is tossed. Without settings an epoch is
every record once. A source goes on where it stopped: when its records are used up in the middle of an epoch, its next
pass begins, and the next epoch continues that pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Annotated

import numpy as np
from pydantic import Field

from mllm.schema import Schema

Amount = Annotated[float, Field(ge=0, allow_inf_nan=False)]
MoreThanZero = Annotated[float, Field(gt=0, allow_inf_nan=False)]
ENDLESS = 1 << 62
"""Records left of a source without `max_passes`."""


@dataclass
class SourceShare(Schema):
    """How much of one source is drawn."""

    weight: Amount | None = None
    """Share of the records drawn, relative to the weights of the other sources. An epoch then draws as many records
    as the sources of a weight above 0 hold together."""
    repeat: Amount | None = None
    """Passes over this source in one epoch, 1 where it is not set; 0.5 takes half of it each epoch."""
    max_passes: MoreThanZero | None = None
    """Passes over this source in the whole run at most; what is missing is drawn from the others if shares are set by
    weights or temperature, and is left away if not."""


@dataclass
class MixtureConfig(Schema):
    """How sources are mixed. Where nothing is set, an epoch is every sample of every source once."""

    shares: list[SourceShare] = field(default_factory=list)
    """One entry a source, in their order; or none at all."""
    temperature: MoreThanZero = 1.0
    """Shares are raised to the power 1 / temperature: above 1 small sources are drawn more often, large ones less."""


class Mixture:
    """The draws of each epoch: a function of (sizes, settings, epoch)."""

    def __init__(self, sizes: Sequence[int] | np.ndarray, config: MixtureConfig) -> None:
        shares = config.shares or [SourceShare() for _ in sizes]
        self.sizes, self.temperature = np.asarray(sizes, dtype=np.int64), config.temperature
        check(shares, self.sizes)
        self.weighted = any(share.weight is not None for share in shares)
        self.repeats = [Fraction(str(1.0 if s.repeat is None else s.repeat)) * n for s, n in self._pairs(shares)]
        bases = [s.weight or 0.0 for s in shares] if self.weighted else [float(repeat) for repeat in self.repeats]
        self.weights = (np.array(bases) / max(bases)) ** (1 / self.temperature) * (np.array(bases) > 0)
        caps = [
            ENDLESS if s.max_passes is None else int(Fraction(str(s.max_passes)) * n) for s, n in self._pairs(shares)
        ]
        self.caps = np.array(caps, dtype=np.int64)
        self._drawn = [np.zeros(len(self.sizes), dtype=np.int64)]
        self._owed = np.zeros(len(self.sizes))

    def _pairs(self, shares: Sequence[SourceShare]) -> list[tuple[SourceShare, int]]:
        return list(zip(shares, self.sizes.tolist(), strict=True))

    def drawn(self, epoch: int) -> np.ndarray:
        """Records of each source drawn before that epoch."""
        while len(self._drawn) <= epoch:
            self._drawn.append(self._drawn[-1] + self._next(len(self._drawn) - 1))
        return self._drawn[epoch]

    def draws(self, epoch: int) -> np.ndarray:
        """Records of each source drawn in that epoch."""
        return self.drawn(epoch + 1) - self.drawn(epoch)

    def exhausted(self, epoch: int) -> bool:
        """Whether every source has come to its `max_passes` before that epoch."""
        return bool((self.drawn(epoch) >= self.caps)[self.weights > 0].all())

    def _next(self, epoch: int) -> np.ndarray:
        """The draws of the epoch after those that are known. After the last one the caps count no more: the rows that
        complete the last step come from there."""
        left = np.full_like(self.caps, ENDLESS) if self.exhausted(epoch) else self.caps - self._drawn[-1]
        if not self.weighted and self.temperature == 1:
            wanted = [int(repeat * (epoch + 1)) - int(repeat * epoch) for repeat in self.repeats]
            return np.minimum(np.array(wanted, dtype=np.int64), left)
        total = int(self.sizes[self.weights > 0].sum()) if self.weighted else int(sum(self.repeats))
        draws, self._owed = allot(total, self.weights, left, self._owed)
        return draws


def check(shares: Sequence[SourceShare], sizes: np.ndarray) -> None:
    """Refuse what cannot be drawn.

    Raises:
        ValueError: says which source, and what to change.
    """
    if len(shares) != len(sizes):
        raise ValueError(f"{len(shares)} shares for {len(sizes)} data.sources: give one for each source, or none")
    weighted = [number for number, share in enumerate(shares) if share.weight is not None]
    repeated = [number for number, share in enumerate(shares) if share.repeat is not None]
    if weighted and repeated:
        raise ValueError(
            f"data.sources.{weighted[0]} has a weight and data.sources.{repeated[0]} a repeat: set the mixture by "
            f"weights (shares) or by repeats (passes an epoch), not by both"
        )
    if weighted and len(weighted) < len(shares):
        missing = min(set(range(len(shares))) - set(weighted))
        raise ValueError(
            f"data.sources.{missing} has no weight and others have: give every source one, 0 leaves it out"
        )
    for number, share in enumerate(shares):
        if share.weight and not sizes[number]:
            raise ValueError(f"data.sources.{number} has weight {share.weight:g} but no usable record: set it to 0")
    amounts = [share.weight if weighted else 1.0 if share.repeat is None else share.repeat for share in shares]
    if not any(amount and size for amount, size in zip(amounts, sizes, strict=True)):
        name = "weight" if weighted else "repeat"
        raise ValueError(f"every source that holds records has {name} 0: give one of them a {name} above 0")
    if all(int((share.max_passes or 1) * size) == 0 for share, size in zip(shares, sizes, strict=True)):
        raise ValueError("max_passes is less than one record of every source: raise it")


def allot(total: int, weights: np.ndarray, left: np.ndarray, owed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Integers in proportion to the weights, at most `left`, together `total` or all that is left.

    What a full source cannot give is shared by the others. `owed` is what each source was rounded off before: who is
    owed most is rounded up, so that no source falls behind over the epochs. Returns the new `owed` as well.
    """
    draws, active = np.zeros_like(left), (weights > 0) & (left > 0)
    while active.any() and draws.sum() < total:
        rest = total - int(draws.sum())
        wanted = np.where(active, rest * weights / weights[active].sum(), 0)
        full = active & (wanted >= left)
        if not full.any():
            base = np.floor(wanted).astype(np.int64)
            urgency = np.where(active & (wanted > base), owed + wanted - base, -np.inf)
            base[np.argsort(-urgency, kind="stable")[: rest - int(base.sum())]] += 1
            return draws + base, owed + np.where(active, wanted - base, 0)
        draws[full], active = left[full], active & ~full
    return draws, owed


def quotas(draws: np.ndarray, size: int) -> np.ndarray:
    """Records of each source before window 0, 1, ... of an epoch, and in the whole epoch; int64 [windows + 1, sources].

    Each window holds `size` records, the last one the rest. Each count of each window is the source's exact share of
    that window rounded up or down, and so is each count from the epoch's beginning to a window's end. Rounding up is
    handing out, in each window, a number of places among sources that each must get a fixed share of places over time,
    never being a whole place ahead or behind: the problem of Pfair scheduling, solved by its algorithm PF (Baruah,
    Cohen, Plaxton, Varvel, "Proportionate Progress", 1996).
    """
    total = int(draws.sum())
    windows = -(-total // size)
    if windows == 0:
        return np.zeros((1, len(draws)), dtype=np.int64)
    counts = np.zeros((windows + 1, len(draws)), dtype=np.int64)
    counts[-1] = draws
    base, part = np.divmod(draws * size, total)
    places = int(part.sum()) // total  # sources that are rounded up in each window
    exact = part * np.arange(windows - 1)[:, None]  # [windows - 1, sources], in units of 1 / total
    sign = np.sign(exact % total + part - total)  # whether the window completes a place: not yet, just, or more
    future = urgencies(sign)
    ahead = np.zeros_like(draws)  # places each source has got
    for window in range(windows - 1):
        lag = exact[window] - ahead * total
        must = (lag > 0) & (sign[window] >= 0)
        may = ~must & (part > 0) & ((lag >= 0) | (sign[window] > 0))
        order = np.argsort(np.where(may, -future[window], len(draws)), kind="stable")
        up = must.copy()
        up[order[: places - int(must.sum())]] = True
        ahead += up
        counts[window + 1] = counts[window] + base + up
    return counts


def urgencies(sign: np.ndarray) -> np.ndarray:
    """For each window, the rank of each source by its signs in the windows after it up to the first 0, as words are
    ranked; computed from the end."""
    ranks, rank = np.zeros_like(sign), np.zeros(sign.shape[1], dtype=np.int64)
    for window in range(len(sign) - 1, -1, -1):
        ranks[window] = rank
        word = sign[window] * (sign.shape[1] + 1) + np.where(sign[window] == 0, 0, rank)
        rank = np.unique(word, return_inverse=True)[1]
    return ranks
