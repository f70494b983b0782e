"""Answers about every cell as few small tables, and those tables as answers again.

Enters: cell (encoder, connector, LLM) -> `Answer`. Leaves: Markdown: a grid of encoders and connectors, which grid is
that of which LLMs and which reasons these add everywhere, and the numbered reasons. Nothing is supposed
of how answers come together: an LLM whose answers are those of no grid with reasons on top gets a grid of its own.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from models.matrix import Cell

Place = tuple[str, str]
"""Encoder and connector."""


@dataclass(frozen=True)
class Answer:
    """Yes as what, or no and why."""

    yes: str
    reasons: frozenset[str] = frozenset()

    def with_reasons(self, more: frozenset[str]) -> Answer:
        return Answer("", self.reasons | more) if more else self


Grid = dict[Place, Answer]


def draw(answers: dict[Cell, Answer]) -> str:
    """Markdown."""
    own = by_llm(answers)
    found, rows = share(own)
    names = {id(grid): letter for grid, letter in zip(found, "ABCDEFGHIJKLMNOPQRSTUVWXYZ", strict=False)}
    numbers: dict[str, int] = {}
    parts = [draw_grid(grid, names[id(grid)], numbers) for grid in found]
    alike: dict[tuple[str, str], list[str]] = {}
    for llm in own:
        grid, more = rows[llm]
        alike.setdefault((names[id(grid)], numbered(more, numbers)), []).append(f"`{llm}`")
    lines = ["| LLM | grid | and besides |", "|---|---|---|"]
    lines += [f"| {', '.join(llms)} | {name} | {more} |" for (name, more), llms in alike.items()]
    told = [f"{number}. {reason}" for reason, number in numbers.items()]
    return "\n".join([*parts, *lines, "", *told, ""])


def by_llm(answers: dict[Cell, Answer]) -> dict[str, Grid]:
    """LLM -> its grid, in the order of the cells."""
    found: dict[str, Grid] = {}
    for cell, answer in answers.items():
        found.setdefault(cell.llm, {})[cell.encoder, cell.connector] = answer
    return found


def share(own: dict[str, Grid]) -> tuple[list[Grid], dict[str, tuple[Grid, frozenset[str]]]]:
    """The fewest grids found that give all of them, and LLM -> (its grid, the reasons that it adds to every cell)."""
    found: list[Grid] = []
    rows = {}
    for llm in sorted(own, key=lambda name: sum(len(answer.reasons) for answer in own[name].values())):
        for grid in found:
            more = frozenset.intersection(*(own[llm][place].reasons - grid[place].reasons for place in grid))
            if all(own[llm][place] == grid[place].with_reasons(more) for place in grid):
                rows[llm] = grid, more
                break
        else:
            found.append(own[llm])
            rows[llm] = own[llm], frozenset()
    return found, rows


def draw_grid(grid: Grid, name: str, numbers: dict[str, int]) -> str:
    """A row an encoder, a column a connector; new reasons get the next numbers."""
    encoders, connectors = (list(dict.fromkeys(place[axis] for place in grid)) for axis in (0, 1))
    lines = [
        f"| {name} | {' | '.join(f'`{connector}`' for connector in connectors)} |",
        "|---" * (len(connectors) + 1) + "|",
    ]
    for encoder in encoders:
        entries = [grid[encoder, connector] for connector in connectors]
        told = [f"**{entry.yes}**" if entry.yes else numbered(entry.reasons, numbers) for entry in entries]
        lines.append(f"| `{encoder}` | {' | '.join(told)} |")
    return "\n".join([*lines, ""])


def numbered(reasons: frozenset[str], numbers: dict[str, int]) -> str:
    for reason in sorted(reasons):
        numbers.setdefault(reason, len(numbers) + 1)
    return ", ".join(str(number) for number in sorted(numbers[reason] for reason in reasons))


def read(text: str) -> dict[tuple[str, str, str], Answer]:
    """What a person reads in `draw`'s Markdown: (encoder, connector, LLM) -> answer."""
    reasons = {int(number): reason for number, reason in re.findall(r"^(\d+)\. (.+)$", text, re.MULTILINE)}
    tables = [[cells(line) for line in block.splitlines()] for block in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)]
    *drawn, llms = tables
    found: dict[str, Grid] = {}
    for (name, *connectors), _, *rows in drawn:
        found[name] = {
            (encoder, connector): read_entry(entry, reasons)
            for encoder, *entries in rows
            for connector, entry in zip(connectors, entries, strict=True)
        }
    return {
        (encoder, connector, llm): answer.with_reasons(looked_up(more, reasons))
        for names, name, more in llms[2:]
        for llm in re.findall(r"\w+", names)
        for (encoder, connector), answer in found[name].items()
    }


def read_entry(entry: str, reasons: dict[int, str]) -> Answer:
    return Answer(entry[2:-2]) if entry.startswith("**") else Answer("", looked_up(entry, reasons))


def cells(line: str) -> list[str]:
    return [cell.strip().strip("`") for cell in line.strip().strip("|").split("|")]


def looked_up(entry: str, reasons: dict[int, str]) -> frozenset[str]:
    return frozenset(reasons[int(number)] for number in entry.split(",") if number.strip())
