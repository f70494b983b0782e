"""How records lie on disk: one file here a layout, each read in order once and then at random.

Enters: a local file. Leaves: a `Container`, whose records are plain Python (mostly mappings); what they mean is for
`formats`. A record that cannot be read is an exception in its place; a file that is broken as a whole raises.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol


class Container(Protocol):
    """One open file of records."""

    def scan(self) -> Iterator[tuple[int, int, Any]]:
        """Yield (start, size, record) in order: the two numbers by which `fetch` finds the record again."""
        ...

    def fetch(self, start: int, size: int) -> Any:
        """The record that `scan` gave there.

        Raises:
            ValueError: no record is there any more.
        """
        ...


def open_container(path: Path, columns: list[str] | None = None) -> Container:
    """The file as records, by what it is: seen from its bytes, or from its name where bytes do not tell.

    `columns` names the cells of a CSV or TSV whose first line does not.
    """
    from mllm.data.containers.arrow import ArrowRows, arrow_of_parquet
    from mllm.data.containers.cells import Cells
    from mllm.data.containers.json_lines import JsonLines
    from mllm.data.containers.json_list import JsonList, is_list
    from mllm.data.containers.tar import Tar

    with path.open("rb") as file:
        head = file.read(512)
    suffix = path.suffix.lower()
    if head.startswith(b"PAR1") or suffix == ".parquet":
        return ArrowRows(arrow_of_parquet(path), path)
    if head.startswith(b"ARROW1") or suffix == ".arrow":
        return ArrowRows(path, path)
    if head[257:262] == b"ustar" or suffix == ".tar":
        return Tar(path)
    if suffix in (".csv", ".tsv"):
        return Cells(path, columns)
    return JsonList(path) if is_list(path) else JsonLines(path)
