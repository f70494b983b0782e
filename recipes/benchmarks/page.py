"""BENCHMARKS.md, from the numbers that the benchmark wrote.

Enters: the JSON files in `results/`, each what one command left on one machine. Leaves: the page with a block for each
of them that it names, filled in; the words around the blocks are kept. A test holds the page to its files.

    python recipes/benchmarks/page.py
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.append(str(Path(__file__).parents[1]))

from rich.table import Table
from rich.text import Text

from benchmarks.fp8_report import cosine_table, curve_table
from benchmarks.peers_report import facts_table, peers_table
from benchmarks.training_report import count_table, rate_table, ratio_table, remarks, room_table

RESULTS = Path(__file__).parent / "results"
PAGE = Path(__file__).parents[2] / "BENCHMARKS.md"
README = Path(__file__).parents[2] / "README.md"
QUOTED = "train-h200"
LINES = {"B4 1.5B": "the connector of Qwen2.5-1.5B, on captions", "S2 7B": "a LoRA of Qwen2.5-7B, on conversations"}
"""What the README quotes."""
BLOCK = r"(<!-- {name} -->\n).*?(<!-- /{name} -->)"
LIBRARIES = ("torch", "transformers", "trl", "triton", "accelerate", "peft")


def filled(page: str, results: dict[str, dict[str, Any]]) -> str:
    """The page with the tables of each file between the marks that bear its name."""
    for name, found in results.items():
        page = put(page, name, tables(found))
    return page


def put(page: str, name: str, words: str) -> str:
    """The page with these words between the marks of that name.

    Raises:
        ValueError: the page has no such marks, or several.
    """
    page, blocks = re.subn(BLOCK.format(name=name), lambda marks: marks[1] + words + marks[2], page, flags=re.S)
    if blocks != 1:
        raise ValueError(f"{blocks} blocks <!-- {name} --> for {name}.json: there must be one")
    return page


def quoted(readme: str, results: dict[str, dict[str, Any]]) -> str:
    """README.md with the two lines that it quotes."""
    found = results[QUOTED]
    told = [
        f"- {words}: **{row['tokens_per_second']:,.0f} real tokens/s**, {100 * row['mfu']:.1f} % MFU\n"
        for name, words in LINES.items()
        for row in [found["rows"][name]]
    ]
    return put(readme, QUOTED, "".join(told))


def tables(found: dict[str, Any]) -> str:
    """Machine, date, command; then what was measured."""
    return "\n".join([origin(found), *(markdown(table) for table in shown(found))])


def shown(found: dict[str, Any]) -> list[Table]:
    """The tables of the command that wrote these numbers, as it showed them."""
    subject = found["machine"]["command"].split()[2]
    if subject == "chat":
        from benchmarks.chat_report import chat_table  # imports image processors

        return [chat_table(found)]
    if subject == "fp8":
        return [cosine_table(found), curve_table(found)]
    if subject == "peers":
        return [peers_table(found), facts_table(found)]
    return [rate_table(found), room_table(found)] if "rows" in found else [count_table(found), ratio_table(found)]


def markdown(table: Table) -> str:
    """A table of the screen as one of Markdown."""
    rows = zip(*(list(column.cells) for column in table.columns), strict=True)
    heads = [plain(column.header) for column in table.columns]
    cells = [heads, ["---"] * len(heads), *([plain(cell) for cell in row] for row in rows)]
    return "\n".join("| " + " | ".join(row) + " |" for row in cells) + "\n"


def plain(cell: Any) -> str:
    """Words without colour, on one line."""
    return Text.from_markup(str(cell)).plain.replace("\n", " ")


def origin(found: dict[str, Any]) -> str:
    """One sentence: where, when, how."""
    machine = found["machine"]
    where = machine.get("gpu") or f"{machine['processor']}, {machine['cores']} cores"
    libraries = ", ".join(f"{name} {machine[name]}" for name in LIBRARIES if machine.get(name))
    ceiling = (
        f" A product of two random matrices of 8192 x 8192: {found['ceiling'] / 1e12:.0f} TFLOP/s."
        if "ceiling" in found and not found.get("rehearsal")
        else ""
    )
    ceiling += " A rehearsal at tiny sizes: its figures say nothing." if found.get("rehearsal") else ""
    read = remarks(found) if "rows" in found else ""
    calls = f" In {found['calls']} calls, of which this was the last." if found.get("calls", 1) > 1 else ""
    return f"{where}; {libraries}; {machine['date']}: `{machine['command']}`.{ceiling}{calls}{read}\n"


def read_results(folder: Path = RESULTS) -> dict[str, dict[str, Any]]:
    """By name, without the ending."""
    return {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}


if __name__ == "__main__":
    known = read_results()
    PAGE.write_text(filled(PAGE.read_text(), known))
    README.write_text(quoted(README.read_text(), known))
