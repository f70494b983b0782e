"""From scores to what is kept: pure, one pass.

Enters: the lines of all samples in order, rules, scores from outside, the looks of a benchmark. Leaves: for each
sample that is left out the reasons, the first of which counts. Copies are looked for last, among what all other rules
keep: a picture is not lost because a worse copy of it stood first.
"""

from __future__ import annotations

import base64
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa

from mllm.data.curation.filters.copies import first_copies, found_in
from mllm.data.curation.filters.look import Looks, stacked
from mllm.data.curation.filters.measure import Line
from mllm.data.curation.filters.rules import Reason, Rules, judge
from mllm.data.indexing.columns import told_apart


@dataclass
class Benchmark:
    """Pictures that must not be learned from."""

    names: list[str]
    looks: Looks


@dataclass
class Verdict:
    """What becomes of every sample."""

    ids: list[str | None]
    """As in the index of a run that reads this source alone; None where the record cannot be read any more."""
    reasons: dict[int, list[Reason]] = field(default_factory=dict)
    """Of the samples that are left out, by number."""

    @property
    def kept(self) -> int:
        return len(self.ids) - len(self.reasons)

    def counts(self) -> Counter[str]:
        """Samples left out, by the first reason."""
        return Counter(reasons[0].rule for reasons in self.reasons.values())


class Pictures:
    """The pictures that samples show; one that several samples name is one picture."""

    def __init__(self) -> None:
        self.looks: list[bytes] = []
        self.names: list[str] = []
        self.of_sample: dict[int, list[int]] = {}
        self.by_name: dict[str, int] = {}

    def add(self, sample: int, id: str, looks: Iterable[tuple[str | None, str]]) -> None:
        self.of_sample[sample] = [self.number(name, id, base64.b64decode(look)) for name, look in looks]

    def number(self, name: str | None, id: str, look: bytes) -> int:
        if name is None or name not in self.by_name:
            self.looks.append(look)
            self.names.append(name or f"an image of {id}")
            if name is None:
                return len(self.looks) - 1
            self.by_name[name] = len(self.looks) - 1
        return self.by_name[name]


def decide(
    lines: Iterable[Line],
    rules: Rules,
    outside: Callable[[str], float | None] | None = None,
    benchmark: Benchmark | None = None,
) -> Verdict:
    """Judge every sample."""
    limits, ids = rules.limits(), []
    reasons: dict[int, list[Reason]] = {}
    pictures = Pictures()
    for number, line in enumerate(lines):
        ids.append(line["id"])
        found = faults(line) or judge_line(line, limits, outside)
        if found:
            reasons[number] = found
        elif line.get("looks"):
            pictures.add(number, line["id"], line["looks"])
    if benchmark:
        reasons |= leaked(pictures, benchmark, rules.leak_distance)
    if rules.duplicates is not None:
        reasons |= copied(pictures, rules.duplicates)
    return Verdict(told_apart_ids(ids), reasons)


def faults(line: Line) -> list[Reason]:
    return [Reason("unreadable", f"{line['fault']}: {line['cause']}")] if "fault" in line else []


def judge_line(line: Line, limits: list, outside: Callable[[str], float | None] | None) -> list[Reason]:
    """The limits that a line breaks; a score is asked for if there are any from outside."""
    if outside is None:
        return judge(line, limits)
    score = outside(line["id"])
    if score is None:
        return [*judge(line, limits), Reason("min_score", "no score")]
    return judge({**line, "score": score}, limits)


def leaked(pictures: Pictures, benchmark: Benchmark, distance: int) -> dict[int, list[Reason]]:
    """The samples that show a picture of the benchmark; `pictures` forgets them."""
    places = found_in(stacked(pictures.looks), benchmark.looks, distance)
    found = {}
    for sample, shown in list(pictures.of_sample.items()):
        first = next((picture for picture in shown if places[picture] >= 0), None)
        if first is not None:
            told = f"{pictures.names[first]} looks like {benchmark.names[places[first]]}"
            found[sample] = [Reason("benchmark", told)]
            del pictures.of_sample[sample]
    return found


def copied(pictures: Pictures, distance: int) -> dict[int, list[Reason]]:
    """The samples all of whose pictures are copies of earlier ones."""
    shown = np.unique(np.fromiter((p for each in pictures.of_sample.values() for p in each), np.int64))
    original = np.full(len(pictures.looks), -1, dtype=np.int64)
    places = first_copies(stacked([pictures.looks[picture] for picture in shown]), distance)
    original[shown] = np.where(places >= 0, shown[places], -1)
    found = {}
    for sample, mine in pictures.of_sample.items():
        if all(original[picture] >= 0 for picture in mine):
            told = f"{pictures.names[mine[0]]} is a copy of {pictures.names[original[mine[0]]]}"
            found[sample] = [Reason("duplicates", told)]
    return found


def told_apart_ids(ids: list[str | None]) -> list[str | None]:
    if not ids:
        return []
    names: list[str | None] = told_apart(pa.chunked_array([pa.array(ids, pa.string())])).to_pylist()
    return names
