"""The ledger of a filter: read = kept + removed, and by which rule.

Enters: a store and a verdict. Leaves: the numbers, and a table of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mllm.data.curation.filters.rules import Rules
from mllm.data.curation.filters.store import Store
from mllm.data.curation.filters.verdict import Verdict
from mllm.data.curation.source_options import format_of
from mllm.data.formats.source import Source

if TYPE_CHECKING:
    from rich.console import Console


def summarise(store: Store, verdict: Verdict, source: Source) -> dict[str, Any]:
    """The ledger: read = kept + removed."""
    faults, filtered = len(store.faults), sum(store.filtered.values())
    removed: dict[str, int] = {"unreadable": faults, "left out by the source": filtered}
    for rule, count in verdict.counts().items():
        removed[rule] = removed.get(rule, 0) + count
    read = len(verdict.ids) + faults + filtered
    assert read == verdict.kept + sum(removed.values()), f"{read} read, {verdict.kept} kept, {removed} removed"
    return {
        "path": str(source.path),
        "format": format_of(source),
        "image_dir": str(source.image_dir or source.files()[0].folder),
        "read": read,
        "kept": verdict.kept,
        "removed": read - verdict.kept,
        "by_rule": {rule: count for rule, count in removed.items() if count},
    }


def show(console: Console, summary: Mapping[str, Any], rules: Rules, out: Path | None) -> None:
    """The ledger as a table, and what to do next."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    table.add_column("rule")
    for name in ("limit", "samples", "share"):
        table.add_column(name, justify="right")
    limits = {limit.rule: f"{limit.bound:g}" for limit in rules.limits()}
    limits |= {"duplicates": f"{rules.duplicates} bits", "benchmark": f"{rules.leak_distance} bits"}
    read = max(1, summary["read"])
    for rule, count in summary["by_rule"].items():
        table.add_row(rule, limits.get(rule, ""), f"{count:,}", f"{count / read:.1%}", style="red")
    table.add_row("removed", "", f"{summary['removed']:,}", f"{summary['removed'] / read:.1%}", style="bold red")
    table.add_row("kept", "", f"{summary['kept']:,}", f"{summary['kept'] / read:.1%}", style="bold green")
    table.add_row("read", "", f"{summary['read']:,}", "", style="dim")
    console.print(table)
    if out is None:
        return
    console.print(f"{out}: kept.jsonl, removed.jsonl, scores.jsonl, summary.json", highlight=False)
    for file in summary.get("records", ()):
        source = f"{{format: {summary['format']}, path: {file}, image_dir: {summary['image_dir']}}}"
        console.print(f"read the kept records with: {source} and the same options", highlight=False, soft_wrap=True)
