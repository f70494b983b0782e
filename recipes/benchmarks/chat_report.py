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


def chat_table(found: dict[str, Any]) -> Table:
    """Ways of decoding beside each other; below them what was aimed at."""
    table = Table("LLM", "way", *(title for title, _ in COLUMNS.values()), title="two turns about a picture")
    for size, told in found.items():
        if not isinstance(told, dict) or "ways" not in told:
            continue
        for way, figures in told["ways"].items():
            if "error" in figures:
                table.add_row(size, way, figures["error"][:80])
                continue
            table.add_row(
                size, way, *(form.format(figures[n]) if n in figures else "" for n, (_, form) in COLUMNS.items())
            )
        if found["device"] == "cuda" and size in TARGETS:
            table.add_row(size, "target", *(str(TARGETS[size].get(name, "")) for name in COLUMNS))
    return table
