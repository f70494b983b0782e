"""One JSON object a line.

Enters: a file. Leaves: a `Container` whose records lie at a byte offset: a fetch reads that line and no other.
"""

from __future__ import annotations

import json
from codecs import BOM_UTF8
from collections.abc import Iterator
from pathlib import Path
from typing import Any


class JsonLines:
    """Lines that are blank are no records."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.file = path.open("rb")

    def scan(self) -> Iterator[tuple[int, int, Any]]:
        start = 0
        with self.path.open("rb") as lines:
            for line in lines:
                mark = BOM_UTF8 if start == 0 and line.startswith(BOM_UTF8) else b""
                text = line.removeprefix(mark)
                if text.strip():
                    yield start + len(mark), len(text), parse(text)
                start += len(line)

    def fetch(self, start: int, size: int) -> Any:
        return parse(read_at(self.file.fileno(), start, size))


def read_at(descriptor: int, start: int, size: int) -> bytes:
    """Bytes at a place, whoever else reads the same file: workers that were forked share its position."""
    import os

    data = os.pread(descriptor, size, start)
    if len(data) != size:
        raise ValueError("the file is shorter than when it was indexed: index it again")
    return data


def parse(text: bytes | str) -> Any:
    """What JSON says, or the error itself: the record in whose place it stands is the bad one."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # also bytes that are no UTF-8, numbers and nests without end
        return ValueError(f"not valid JSON ({error}): write one JSON object a line, or one list of them")
