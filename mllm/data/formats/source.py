"""What every source of samples has in common: where it lies, where its images lie, and how its faults are told.

Enters: a path and, where images are named by relative paths, their folder. Leaves: the base class that a format
inherits (its `read` yields one `Sample` a record) and `fault`, the one form of message for a record that cannot be
used.
"""

from __future__ import annotations

import json
from codecs import BOM_UTF8
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mllm.schema import Schema
from mllm.types import IMAGE_TOKEN, ImageSource, Mark, Sample


@dataclass
class Source(Schema):
    """A file of records; `format` in each subclass is the name that YAML uses."""

    path: Path
    """The file of records."""
    image_dir: Path | None = None
    """Folder that relative image paths start from; the file's own folder where none is given."""

    def read(self) -> Iterator[Sample | ValueError]:
        """Yield a `Sample` for each good record, in order, and a `ValueError` that names file and row for each bad
        one."""
        for row, record in enumerate(self.records()):
            where = f"{self.path}, row {row}"
            try:
                yield from list(self.samples(record, where, default_id=f"{self.path.stem}/{row}"))
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                yield fault(where, error)

    def records(self) -> Iterator[Any]:
        """Yield the raw records of a JSON list, or of a file with one JSON object a line."""
        if not self.path.is_file():
            raise ValueError(f"no data file {self.path}: give its path with --data.sources.N.path")
        with self.path.open("rb") as lines:
            first = next((line for line in lines if line.strip()), b"").removeprefix(BOM_UTF8)
            lines.seek(0)
            if first.lstrip().startswith(b"["):
                whole = parse(lines.read())
                if isinstance(whole, list):
                    yield from whole
                    return
                if not isinstance(parse(first), list):  # a list cut short, not lines of which the first is a list
                    raise ValueError(f"{self.path} is no whole JSON list ({whole}): write or download it again")
                lines.seek(0)
            yield from (parse(line) for line in lines if line.strip())

    def samples(self, record: Any, where: str, default_id: str) -> Iterator[Sample]:
        """Yield what one raw record holds."""
        raise NotImplementedError(f"{type(self).__name__} must say how a record becomes samples")

    def image(self, name: Any) -> ImageSource:
        """Where the image of that name lies: URLs and data URIs stay as they are."""
        if not isinstance(name, str) or not name:
            raise ValueError(f"an image is named {str(name)[:80]!r}: give a path, a URL or a data URI")
        if name.startswith(("http://", "https://", "data:")):
            return name
        return (self.image_dir or self.path.parent) / name


def parse(text: bytes) -> Any:
    """What JSON says, or the error itself, which `samples` will meet as a record that is no mapping."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # also bytes that are no UTF-8, numbers and nests without end
        return error


def mapping(record: Any) -> dict[str, Any]:
    """The record itself if it is a mapping, a `ValueError` that says what it is if not."""
    if isinstance(record, Exception):
        raise ValueError(f"not valid JSON ({record}): write one JSON object a line, or one list of them")
    if not isinstance(record, dict):
        raise ValueError(f"expected a JSON object, found {str(record)[:80]!r}: write it as {{key: value}}")
    return record


def sequence(value: Any, key: str) -> list[Any]:
    """The list that stands under a key, a `ValueError` that says what stands there if it is none."""
    if not isinstance(value, list):
        raise ValueError(f"`{key}` must be a list, found {str(value)[:80]!r}")
    return value


def names_of(value: Any) -> list[Any]:
    """The images of a record: none, one name or several."""
    if value is None:
        return []
    return [value] if isinstance(value, str) else sequence(value, "images")


def text_of(value: Any, key: str) -> str:
    """The words that stand under a key, a `ValueError` that says what stands there if they are none."""
    if not isinstance(value, str):
        raise ValueError(f"`{key}` must be text, found {str(value)[:80]!r}: write a string")
    value.encode()  # half a surrogate pair, which JSON can spell and no tokenizer takes, is a ValueError here
    return value


def id_of(record: dict[str, Any], default: str) -> str:
    """The record's own id, or the default where it has none."""
    return default if record.get("id") is None else str(record["id"])


def fault(where: str, error: Exception) -> ValueError:
    """The one form of message for a bad record: file, row, what is wrong."""
    missing = f"the key {error} is missing: add it, or check that `format` is this file's"
    text = missing if isinstance(error, KeyError) else str(error)
    return ValueError(f"{where}: {text}")


def split_at_images(text: str) -> list[str | Mark]:
    """`"<image>\\nWhat?"` -> `[Mark.IMAGE, "\\nWhat?"]`."""
    parts: list[str | Mark] = []
    for i, words in enumerate(text.split(IMAGE_TOKEN)):
        if i:
            parts.append(Mark.IMAGE)
        if words:
            parts.append(words)
    return parts


def check(sample: Sample) -> Sample:
    """A sample that can be learned from: someone answers, and every placeholder has its image and the reverse."""
    if not sample.messages:
        raise ValueError("the conversation is empty")
    if not any(message.role == "assistant" and message.text.strip() for message in sample.messages):
        raise ValueError("the assistant says nothing: there is nothing to learn from")
    marks = sum(message.num_images for message in sample.messages)
    if marks != len(sample.images):
        raise ValueError(
            f"{marks} {IMAGE_TOKEN} placeholders but {len(sample.images)} images: write one placeholder for each image"
        )
    return sample
