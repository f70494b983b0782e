"""CSV and TSV: a line of names, then a line of cells a record.

Enters: a file. Leaves: a `Container` whose records are mappings of text and lie at a byte offset. An empty cell is
None. Cells are quoted as spreadsheets and pandas do, in TSV too; a cell may then hold line ends.
"""

from __future__ import annotations

import csv
from codecs import BOM_UTF8
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from mllm.data.containers.json_lines import read_at

LARGEST_CELL = 2**27
"""Characters. Some tables hold whole images as text; beyond this a quote was not closed."""

DELIMITERS = ("\t", ",", ";", "|")
LONGEST_HEADER = 2**16
"""Bytes of a first line that are asked for the delimiter."""


class Cells:
    """Rows of a table of text."""

    def __init__(self, path: Path, columns: list[str] | None = None) -> None:
        self.path = path
        self.delimiter = delimiter_of(path)
        self.file = path.open("rb")
        self.columns, self.first = (columns, 0) if columns else self.header()

    def header(self) -> tuple[list[str], int]:
        """The names in the first line, and the byte behind it."""
        with self.path.open("rb") as file:
            lines = Lines(file)
            names = next(self.rows(lines), [])
        if isinstance(names, Exception) or not names or len(set(names)) < len(names):
            raise ValueError(f"{self.path} must start with a line of column names, each once, found {names}")
        return names, lines.end

    def scan(self) -> Iterator[tuple[int, int, Any]]:
        with self.path.open("rb") as file:
            file.seek(self.first)
            lines = Lines(file, self.first)
            start = self.first
            for cells in self.rows(lines):
                if cells != []:
                    yield start, lines.end - start, self.record(cells)
                start = lines.end

    def fetch(self, start: int, size: int) -> Any:
        lines = read_at(self.file.fileno(), start, size).splitlines(keepends=True)
        return self.record(next(self.rows(Lines(lines, start)), []))

    def rows(self, lines: Lines) -> Iterator[list[str] | ValueError]:
        """Yield the cells of each row, or what is wrong with it."""
        csv.field_size_limit(LARGEST_CELL)
        reader = csv.reader(lines, delimiter=self.delimiter, strict=True)
        while True:
            start = lines.end
            try:
                yield next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                if str(error) == "unexpected end of data":
                    raise ValueError(
                        f"{self.path}: the quote that opens in the row at byte {start} is never closed"
                    ) from error
                yield ValueError(f"no row of cells ({error}): put quotes around the whole cell and double those in it")

    def record(self, cells: list[str] | ValueError) -> Any:
        """The row as a mapping, or what is wrong with it."""
        if isinstance(cells, ValueError):
            return cells
        if len(cells) != len(self.columns):
            return ValueError(
                f"{len(cells)} cells, but there are {len(self.columns)} columns: {', '.join(self.columns)}"
            )
        return {name: cell or None for name, cell in zip(self.columns, cells, strict=True)}


def delimiter_of(path: Path) -> str:
    """What stands between cells: the tab or comma of the file's name, unless its first line has none of these but
    another. OpenCLIP's tables are called .csv and have tabs, those of European spreadsheets semicolons."""
    own = "\t" if path.suffix.lower() == ".tsv" else ","
    with path.open("rb") as file:
        first = file.readline(LONGEST_HEADER).decode("utf-8", "replace")
    return next((sign for sign in (own, *DELIMITERS) if sign in first), own)


class Lines:
    """Lines of text, and the byte behind the last one that was taken."""

    def __init__(self, lines: Iterable[bytes], end: int = 0) -> None:
        self.lines = iter(lines)
        self.end = end

    def __iter__(self) -> Lines:
        return self

    def __next__(self) -> str:
        line = next(self.lines)
        mark = BOM_UTF8 if self.end == 0 and line.startswith(BOM_UTF8) else b""
        self.end += len(line)
        return line.removeprefix(mark).decode("utf-8", "surrogateescape")
