"""What `chat` found, as a table.

Enters: the numbers of `chatting.measure`. Leaves: one row for each way of each size.
"""

from __future__ import annotations

from typing import Any

from rich.table import Table

from benchmarks.chatting import TARGETS

COLUMNS = {
    "tokens_per_s": ("tokens/s", "{:,.1f}"),
    "first_token_ms": ("first token, ms", "{:,.1f}"),
    "second_turn_ms": ("second turn, ms", "{:,.1f}"),
    "encoder_calls_first_turn": ("encoder", "{:.0f}"),
    "encoder_calls_second_turn": ("again", "{:.0f}"),
    "prefilled_first_turn": ("computed tokens", "{:.0f}"),
    "prefilled_second_turn": ("second turn", "{:.0f}"),
    "prepared_s": ("prepared, s", "{:,.1f}"),
}
"""Title and form of each figure."""


PAIRED = "CPU time of the second turn: nothing kept / kept"


def chat_table(found: dict[str, Any]) -> Table:
    """Ways of decoding beside each other; below them what was aimed at."""
    heads = [title for title, _ in COLUMNS.values()]
    table = Table("LLM", "way", *heads, PAIRED, title="two turns about a picture")
    for size, told in found.items():
        if isinstance(told, dict) and "ways" in told:
            for row in lines(size, told, found["device"] == "cuda"):
                table.add_row(*row)
    return table


def lines(size: str, told: dict[str, Any], with_targets: bool) -> list[list[str]]:
    """The rows of one size."""
    rows = [[size, way, *cells(figures, told if way == "ordinary" else {})] for way, figures in told["ways"].items()]
    if with_targets and size in TARGETS:
        rows.append([size, "target", *(f"{TARGETS[size].get(name, '')}" for name in COLUMNS), ""])
    return rows


def cells(figures: dict[str, Any], told: dict[str, Any]) -> list[str]:
    if "error" in figures:
        return [figures["error"][:80], *[""] * len(COLUMNS)]
    pairs = told.get("second_turn_vs_anew")
    ratio = "{median:.2f} ({least:.2f} - {greatest:.2f})".format(**pairs) if pairs else ""
    return [*(form.format(figures[name]) if name in figures else "" for name, (_, form) in COLUMNS.items()), ratio]
