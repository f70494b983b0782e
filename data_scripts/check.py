"""The data doctor: reads a data set whole and names everything that is wrong with it, by file and row.

    python data_scripts/check.py PATH [--image-dir DIR] [--format NAME] [--json OUT.json]

Enters: whatever `data.sources` takes: JSON, tables, tars, folders of `datasets`, URLs. Leaves: what it was taken for,
a table of the faults by class with the first of each and what helps, and with `--json` all of them. Every image is
decoded whole. Why: to know before a run, and without a model, what a run would lose.

Exit code, the lowest that fits: 0 nothing found; 2 the path or its layout cannot be read, or a file is broken; 3
records are bad; 4 images are bad; 5 nothing worse than warnings. (1 is Python's own: the program is at fault.)
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from mllm.data.crew import cores
from mllm.data.curation.doctor.classes import CLASSES, WARNING
from mllm.data.curation.doctor.diagnosis import findings_of, first_sample, report
from mllm.data.curation.doctor.examination import examine
from mllm.data.curation.door import run
from mllm.data.curation.source_options import in_words, source_of
from mllm.writable import check_file

SHOWN = 3
"""Findings of a class in the table."""
LOG_WIDTH = 160
"""Characters of a line where no terminal says how many it has."""


def main(
    path: tyro.conf.Positional[str],
    format: str = "auto",
    image_dir: str | None = None,
    split: str = "",
    subset: str = "",
    options: str = "",
    images: bool = True,
    workers: int | None = None,
    json_output: Annotated[Path | None, tyro.conf.arg(name="json")] = None,
) -> int:
    """Examine a data set.

    Args:
        path: File, folder, glob, URL or `hub:OWNER/NAME`, as in `data.sources`.
        format: Name of the format; by default the records say what they are.
        image_dir: Folder or zip archive that relative image paths start from.
        split: Which split, of a path that holds several.
        subset: Which part of a data set of the Hub that has several.
        options: The format's other options as YAML, e.g. '{text: {weights: {alt: 1, dense: 2}}}'.
        images: Open every image; --no-images reads the records alone (quicker, and nothing is downloaded).
        workers: Processes; as many as there are cores by default, 0 for none beside this one.
        json_output: Write the whole report here.
    """
    if json_output:
        check_file(json_output, "--json")
    try:
        source = source_of(path, format, image_dir, split, subset, options)
        print(f"{path}: {in_words(source)}\nthe first sample:\n{first_sample(source)}")
        found = examine(source, cores() if workers is None else workers, images)
        told = report(source, found, findings_of(source, found))
    except ValueError as error:
        write(json_output, {"path": path, "error": str(error), "exit_code": 2})
        raise
    write(json_output, told)
    show(told)
    return int(told["exit_code"])


def write(path: Path | None, told: dict[str, Any]) -> None:
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(told, indent=1) + "\n")


def show(told: dict[str, Any]) -> None:
    """The report on the screen."""
    filtered = f" ({told['filtered']:,} left out on purpose)" if told["filtered"] else ""
    sides = f"sides of {told['smallest_side']} to {told['largest_side']} pixels, " if told["largest_side"] else ""
    print(
        f"{told['records']:,} records{filtered}: {told['samples']:,} samples, {told['text_only']:,} of them without "
        f"images; {told['images']:,} images" + (f", {sides}median {told['median_size']}" if sides else "")
    )
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = LOG_WIDTH
    if told["findings"]:
        console.print(table(told))
    for line in told["advice"]:
        console.print(line, markup=False)
    if not told["findings"]:
        print("nothing wrong")


def table(told: dict[str, Any]) -> Table:
    """A row for each class."""
    grid = Table("count", "fault", "the first, and what helps", show_lines=True)
    for kind, count in told["counts"].items():
        first = [finding for finding in told["findings"] if finding["kind"] == kind][:SHOWN]
        lines = escape("\n".join(f"{place(finding)}: {finding['cause']}" for finding in first))
        colour = "yellow" if CLASSES[kind].code == WARNING else "red"
        grid.add_row(f"{count:,}", f"[{colour}]{kind}[/]", f"{lines}\n[bold]{escape(CLASSES[kind].remedy)}[/]")
    return grid


def place(finding: dict[str, Any]) -> str:
    return finding["file"] if finding["row"] is None else f"{finding['file']}, row {finding['row']}"


def door(arguments: list[str] | None = None) -> int:
    """The command; a mistake is one line, not a traceback."""
    return run(main, __doc__, arguments)


if __name__ == "__main__":
    sys.exit(door())
