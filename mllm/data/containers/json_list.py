"""One JSON list of records, of any size: its records are found one by one, never the whole list at once.

Enters: a file. Leaves: a `Container` whose records lie at a byte offset. `elements` does the finding, and serves
every list inside a JSON file.
"""

from __future__ import annotations

import json
import re
from codecs import BOM_UTF8, getincrementaldecoder
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from mllm.data.containers.json_lines import parse, read_at

CHUNK = 2**20
"""Bytes read at a time."""
BLANK = re.compile(r"[ \t\r\n]*")
LONGEST_WORD = 16
"""Characters: an error this near to the end of what was read may be that end's (`-Infin`, a cut escape)."""


class JsonList:
    """`[{...}, {...}]`, on one line or many."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.file = path.open("rb")

    def scan(self) -> Iterator[tuple[int, int, Any]]:
        with self.path.open("rb") as file:
            text = JsonText(file)
            try:
                text.expect("[")
                yield from text.elements()
                if rest := text.peek():
                    raise ValueError(f"{rest!r} stands behind the list")
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{self.path} is no whole JSON list ({error}): write or download it again") from error

    def fetch(self, start: int, size: int) -> Any:
        return parse(read_at(self.file.fileno(), start, size))


class JsonText:
    """JSON read from its start to its end through a window, with the byte at which the reading stands."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.decoder = getincrementaldecoder("utf-8")("surrogateescape")  # bytes that are no UTF-8 spoil one record
        self.window = ""
        self.at = 0
        """Place in the window, in characters."""
        self.byte = 0
        """The same place in the file."""
        self.whole = False
        """Whether the window reaches to the end of the file."""
        if file.read(len(BOM_UTF8)) == BOM_UTF8:
            self.byte = len(BOM_UTF8)
        else:
            file.seek(0)

    def more(self) -> bool:
        """Widen the window to twice what is left in it; False at the end of the file."""
        if self.whole:
            return False
        data = self.file.read(max(CHUNK, len(self.window) - self.at))
        self.whole = not data
        self.window = self.window[self.at :] + self.decoder.decode(data, final=self.whole)
        self.at = 0
        return not self.whole

    def peek(self) -> str:
        """The next character that is no white space, which is skipped; nothing at the end of the file."""
        while True:
            place = BLANK.match(self.window, self.at).end()  # type: ignore[union-attr]
            self.at, self.byte = place, self.byte + place - self.at
            if self.at < len(self.window):
                return self.window[self.at]
            if not self.more():
                return ""

    def expect(self, sign: str) -> None:
        """Step over a sign that must stand here."""
        if (found := self.peek()) != sign:
            raise ValueError(f"expected {sign!r} at byte {self.byte}, found {found or 'the end of the file'!r}")
        self.at, self.byte = self.at + 1, self.byte + 1

    def elements(self) -> Iterator[tuple[int, int, Any]]:
        """Yield (start, size, value) of each element of the list whose bracket was just stepped over."""
        while self.peek() != "]":
            start = self.byte
            value = self.value()
            yield start, self.byte - start, value
            if self.peek() != "]":
                self.expect(",")
                if self.peek() == "]":
                    raise ValueError(f"expected a value at byte {self.byte}, found ']'")
        self.expect("]")

    def members(self) -> Iterator[str]:
        """Yield each key of the object that starts here; whoever takes one steps over its value."""
        self.expect("{")
        while self.peek() != "}":
            key = self.value()
            self.expect(":")
            yield str(key)
            if self.peek() != "}":
                self.expect(",")
        self.expect("}")

    def skip(self) -> None:
        """Step over one value; over a list element by element, since it may be long."""
        if self.peek() != "[":
            self.value()
            return
        self.expect("[")
        for _ in self.elements():
            pass

    def value(self) -> Any:
        """Step over one value; a value whose bytes are no UTF-8 is the error that says so."""
        self.peek()
        while True:
            try:
                value, end = DECODER.raw_decode(self.window, self.at)
            except json.JSONDecodeError as error:
                cut = error.msg.startswith("Unterminated") or error.pos > len(self.window) - LONGEST_WORD
                if self.whole or not cut:
                    raise ValueError(f"{error.msg} in the value at byte {self.byte}") from error
            else:
                if self.whole or end < len(self.window) - 2:  # a number may go on, also behind `.` and `e-`
                    break
            self.more()
        text = self.window[self.at : end]
        self.at = end
        if text.isascii():
            self.byte += len(text)
            return value
        data = text.encode("utf-8", "surrogateescape")
        self.byte += len(data)
        return value if sound(text) else parse(data)


DECODER = json.JSONDecoder()


def sound(text: str) -> bool:
    """Whether the text came from bytes that are UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def is_list(path: Path) -> bool:
    """Whether the file is one list, and not lines of which the first happens to be one."""
    with path.open("rb") as file:
        head = file.read(CHUNK).removeprefix(BOM_UTF8).lstrip()
        if not head.startswith(b"["):
            return False
        first, newline, rest = head.partition(b"\n")
        return not (newline and rest.strip() and isinstance(parse(first), list))
