"""What every source of samples has in common: where it lies, where its images lie, and how its faults are told.

Enters: a path and, where images are named by relative paths, their folder. Leaves: the base class that a format
inherits (its `read` yields one `Sample` a record) and `fault`, the one form of message for a record that cannot be
used.
"""

from __future__ import annotations

import json
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
                yield from self.samples(record, where, default_id=f"{self.path.stem}/{row}")
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                yield fault(where, error)

    def records(self) -> Iterator[Any]:
        """Yield the raw records of a JSON list, or of a file with one JSON object a line."""
        if not self.path.is_file():
            raise ValueError(f"no data file {self.path}: give its path with --data.sources.N.path")
        with self.path.open(encoding="utf-8") as lines:
            start = lines.read(1)
            lines.seek(0)
            if start == "[":
                yield from json.load(lines)
            else:
                yield from (parse_line(line) for line in lines if line.strip())

    def samples(self, record: Any, where: str, default_id: str) -> Iterator[Sample]:
        """Yield what one raw record holds."""
        raise NotImplementedError(f"{type(self).__name__} must say how a record becomes samples")

    def image(self, name: str) -> ImageSource:
        """Where the image of that name lies: URLs and data URIs stay as they are."""
        if name.startswith(("http://", "https://", "data:")):
            return name
        return (self.image_dir or self.path.parent) / name


def parse_line(line: str) -> Any:
    """One JSON line, or the error itself, which `samples` will meet as a record that is no mapping."""
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        return error


def mapping(record: Any) -> dict[str, Any]:
    """The record itself if it is a mapping, a `ValueError` that says what it is if not."""
    if isinstance(record, json.JSONDecodeError):
        raise ValueError(f"not valid JSON: {record}")
    if not isinstance(record, dict):
        raise ValueError(f"expected a JSON object, found {type(record).__name__}")
    return record


def fault(where: str, error: Exception) -> ValueError:
    """The one form of message for a bad record: file, row, what is wrong."""
    text = f"the key {error} is missing" if isinstance(error, KeyError) else str(error)
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
