"""How the time of a benchmark is shared out: what each configuration costs, and so how long its steps may go on.

Enters: the configurations, results of an earlier run, seconds. Leaves: the order, the least seconds of each, the budget
of the next one. Every configuration gets its least number of steps before any gets more; what is over is shared by the
cost of a token. Costs are those of the H200's own laps; where a configuration has none yet, those of the one that is
most like it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.configurations import Configuration
from benchmarks.stopwatch import Budget

PAID = Path(__file__).parent / "results" / "train-h200.json"
"""Where the costs come from."""
COST = {"tiny": 0.01, "small": 0.02, "0.5B": 0.6, "1.5B": 1.0, "3B": 1.9, "7B": 3.6}
"""Of a token, by the H200's rates (0.5B and 3B by their weights)."""
SLOWER = 1.5
"""How many times a row takes whose like is compiled, or adapted by the fast path, and it is not."""
BUILT = {"eager": 5.0, "compiled": 8.5, "adapted": 13.5}
"""Seconds that building and the first step take where a row before has imported and started the compiler, whose
results rows of one graph share."""
TINY = 0.5
"""Seconds of a rehearsal's row."""
ENOUGH = 0.9
"""Of its least time, what a row must find to be begun: costs are not known to the second."""
PHASES = ("warm-up", "steps", "rooms")
Rows = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Price:
    """Seconds of a configuration."""

    beside: float
    """Of building, of the first step, which compiles, and of ending."""
    step: float
    """Of each other step."""

    def least(self, budget: Budget) -> float:
        """With no more steps than are needed."""
        return self.beside + self.step * (least_warm_up(budget) - 1 + budget.fewest + budget.rooms)


def least_warm_up(budget: Budget) -> int:
    """Steps of the shortest warm-up."""
    return min(budget.warm_up, 2)


def paid(path: Path = PAID) -> Rows:
    """The rows of an earlier run."""
    return json.loads(path.read_text())["rows"]  # type: ignore[no-any-return]


def price(row: Configuration, known: Rows) -> Price:
    """As measured, or guessed by the row that is most like it."""
    if row.llm == "tiny":
        return Price(TINY, 0.0)
    if row.name in known and "laps" in known[row.name]:
        return measured(known[row.name])
    like = min((other for other in known.values() if "laps" in other), key=lambda other: unlike(row, other))
    found, factor = measured(like), COST[row.llm] / COST[like["llm"]]
    steps = row.accumulation / like.get("accumulation", 1)
    slower = SLOWER if row.way != "naive" and not (row.compiled and row.fast_lora) else 1.0
    kind = "eager" if not row.compiled else "adapted" if row.lora else "compiled"
    return Price(BUILT[kind], found.step * factor * steps * slower)


def measured(row: Mapping[str, Any]) -> Price:
    """Of a row that was; a padded batch of the mix is longer than those that were timed as its fill is lower."""
    longer = row["timed_fill"] / row["fill"] if row["way"] == "naive" else 1.0
    beside = sum(seconds for name, seconds in row["laps"].items() if name not in PHASES)
    return Price(beside, longer * row["laps"]["steps"] / row["steps"])


def unlike(row: Configuration, other: Mapping[str, Any]) -> tuple[bool, ...]:
    """What sets it apart, what matters most first."""
    apart = ((row.way == "naive") != (other["way"] == "naive"), row.lora != other["lora"], row.llm != other["llm"])
    return (*apart, row.fp8 != other["fp8"], row.way != other["way"])


def budget_of(row: Configuration, quick: bool = False) -> Budget:
    """Steps of a configuration: of padded batches, which differ in length, a dozen at least, behind a short warm-up,
    since nothing is compiled; the others over as many micro-batches."""
    if row.llm == "tiny":
        return Budget(warm_up=2, steps=3, fewest=2, rooms=1, seconds=2.0)
    if row.way == "naive":
        return Budget(warm_up=3, steps=12 if quick else 40, fewest=12, rooms=1)
    return (Budget(warm_up=4, steps=12, rooms=2) if quick else Budget()).over(row.accumulation)


class Schedule:
    """Who gets how much of what is left."""

    def __init__(self, rows: Sequence[Configuration], known: Rows, quick: bool = False) -> None:
        self.prices = {row.name: price(row, known) for row in rows}
        self.budgets = {row.name: budget_of(row, quick) for row in rows}
        self.ahead = list(rows)

    def least(self, row: Configuration) -> float:
        return self.prices[row.name].least(self.budgets[row.name])

    def next(self, row: Configuration, left: float) -> Budget | None:
        """Of this row, which is done then, with so many seconds left for it and those behind; nothing where they do
        not suffice."""
        over = max(0.0, left - sum(map(self.least, self.ahead)))
        share = row.weight / sum(other.weight for other in self.ahead)
        self.ahead.remove(row)
        if left < ENOUGH * self.least(row):
            return None
        own, price = self.budgets[row.name], self.prices[row.name]
        more = over * share  # seconds beside its least
        warm_up = min(own.warm_up, least_warm_up(own) + int(more / max(price.step, 1e-9)))
        steps = least_warm_up(own) - 1 + own.fewest - 0.5  # half a step less: it ends with the step that is over it
        return replace(own, warm_up=warm_up, seconds=min(own.seconds, more + price.step * steps))


def arranged(rows: Sequence[Configuration], figures: Rows) -> list[Configuration]:
    """Those without a figure first, then the others, then those that failed."""
    without, have, failed = [], [], []
    for row in rows:
        told = figures.get(row.name, {})
        group = have if "tokens_per_second" in told else failed if is_broken(told) else without
        group.append(row)
    return [*without, *have, *failed]


NO_TIME = "no time left"
"""So begins the error of a configuration that was not begun."""


def is_broken(row: Mapping[str, Any]) -> bool:
    """Was it begun, and failed?"""
    return "error" in row and not row["error"].startswith(NO_TIME)
