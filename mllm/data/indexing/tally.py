"""What became of all that was read, in numbers: read = used + skipped, and what was cut off.

Enters: an index, which knows it all beforehand, or the readings of a stream one by one. Leaves: the sums of the
ledger, and whether more is lost than a run allows.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

COUNTED_CAUSES = 50
"""Causes of filtering that the ledger tells apart, the most frequent first."""
IN_A_ROW = 100
"""Unusable samples one after the other that stop a run whatever share it allows: a disk is gone, not a file."""
SETTLED = 1000
"""Readings of a stream before its share of bad ones is judged: one of ten would say nothing."""


@dataclass
class Tally:
    """Of an index: each record once. Of a stream: each reading, so that a record counts in every pass."""

    streamed: bool = False
    """Whether it grows while the run goes on."""
    read: int = 0
    """Samples and bad records."""
    skipped: Counter[str] = field(default_factory=Counter)
    """Class of the fault -> how many reading left out; those left out on purpose are `filtered`."""
    filtered: Counter[str] = field(default_factory=Counter)
    """Cause -> how many a rule of their source left out."""
    truncated: int = 0
    """Samples that are cut to the length of a row."""
    tokens_cut: int = 0
    """Tokens that cutting took away."""
    holes: Counter[str] = field(default_factory=Counter)
    """Class of the fault -> how many could not be read when their turn came."""
    waiting: int = 0
    """Samples of a stream that were read and stand in no row yet."""
    in_a_row: int = 0
    """Bad records that a stream met since its last good one."""

    @property
    def bad_share(self) -> float:
        """Share of the samples that are lost, of those that should be used."""
        wanted = self.read - self.skipped["filtered"]
        return (self.skipped.total() - self.skipped["filtered"] + self.holes.total()) / max(1, wanted)

    def too_bad(self, max_bad_share: float) -> bool:
        """Whether more is lost than that; of a stream, once enough of it was read."""
        return self.bad_share > max_bad_share and (not self.streamed or self.read >= SETTLED)

    def filter(self, cause: str) -> None:
        """One more record that a rule leaves out; causes beyond the first fifty are counted together."""
        known = cause in self.filtered or len(self.filtered) < COUNTED_CAUSES
        self.filtered[cause if known else "other causes"] += 1
        self.skipped["filtered"] += 1

    def summary(self) -> dict[str, Any]:
        """The ledger: read = used + skipped, in a stream + waiting."""
        skipped = self.skipped + self.holes
        if "filtered" in skipped:
            skipped["filtered"] = skipped.pop("filtered")  # comes last
        used = self.read - skipped.total() - self.waiting
        assert used >= 0, f"{self.read} read, {skipped} skipped, {self.waiting} waiting"
        return {
            "read": self.read,
            "used": used,
            "skipped": dict(skipped),
            "filtered": dict(self.filtered.most_common(COUNTED_CAUSES)),
            "truncated": {"samples": self.truncated, "tokens": self.tokens_cut},
            **({"waiting": self.waiting} if self.streamed else {}),
        }

    def state(self) -> dict[str, Any]:
        """JSON values from which `restore` goes on; `holes` are not among them, see `StreamPlan.position`."""
        counts = {name: getattr(self, name) for name in ("read", "truncated", "tokens_cut", "waiting", "in_a_row")}
        return {**counts, "skipped": dict(self.skipped), "filtered": dict(self.filtered)}

    def restore(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            setattr(self, name, Counter(value) if isinstance(value, dict) else value)


def sentence(ledger: dict[str, Any]) -> str:
    """The ledger in one line."""
    skipped, cut = ledger["skipped"], ledger["truncated"]
    why = f" ({', '.join(f'{kind} {number:,}' for kind, number in skipped.items())})" if skipped else ""
    waiting = f" + {ledger['waiting']:,} waiting" if ledger.get("waiting") else ""
    truncated = f"{cut['samples']:,} truncated" + (f" by {cut['tokens']:,} tokens" if cut["samples"] else "")
    used, left_out = f"{ledger['used']:,} used", f"{sum(skipped.values()):,} skipped{why}"
    return f"{ledger['read']:,} read = {used} + {left_out}{waiting}; {truncated}"
