"""Any table: templates say which of its columns is the image, the question and the answer.

Enters: records whose keys nobody else knows, and templates in the manner of `str.format`: `"{sentence} True or
false?"`, `"images/{directory}/{identifier}.png"`, `"{0}"` where a record is a list. Leaves: one `Sample` a record.
The images stand in front of the question unless it says `<image>` itself.
"""

from __future__ import annotations

import re
import string
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from mllm.data.containers import Container, open_container
from mllm.data.files import File
from mllm.data.formats.record import check, id_of, rest, split_at_images, text_of
from mllm.data.formats.source import Origin, Source
from mllm.types import Mark, Message, Sample


@dataclass
class FieldsSource(Source):
    """A table and templates."""

    format: Literal["fields"] = "fields"
    image: list[str] | str = ""
    """The image's path, URL or column, as `images/{name}.png`; several in a list."""
    prompt: str = ""
    """What the user says, as `{question} Answer in one word.`; none for the image alone."""
    answer: str = ""
    """What the assistant says, as `{answer}`."""
    system: str = ""
    """What stands before the conversation."""
    columns: list[str] = field(default_factory=list)
    """Names for the columns of a CSV or TSV that does not name them in its first line."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.answer:
            raise ValueError("format `fields` needs `answer`, a template such as '{answer}': what is learned")

    def samples(self, record: Any, origin: Origin) -> Iterator[Sample]:
        if isinstance(record, Exception):
            raise record
        if not isinstance(record, dict | list):
            raise ValueError(f"expected an object or a list, found {str(record)[:80]!r}")
        templates = [self.image] if isinstance(self.image, str) else self.image
        images = [self.image_of(template, record, origin) for template in templates if template]
        question = split_at_images(fill(self.prompt, record))
        if Mark.IMAGE not in question:
            question[:0] = [Mark.IMAGE] * len(images)
        turns = [("user", question), ("assistant", split_at_images(fill(self.answer, record)))]
        if self.system:
            turns.insert(0, ("system", [fill(self.system, record)]))
        named = record if isinstance(record, dict) else {}
        yield check(
            Sample(
                id=id_of(named, origin.id),
                messages=[Message(role, content) for role, content in turns],
                images=images,
                where=origin.where,
                meta=rest(named, {"id", "__key__"}),
            )
        )

    def image_of(self, template: str, record: Any, origin: Origin) -> Any:
        """The image that a template names; one that is a column and nothing else may hold bytes."""
        whole = re.fullmatch(r"\{([^{}:!]+)\}", template)
        named = Strict().get_field(whole[1], *arguments(record))[0] if whole else fill(template, record)
        return self.locate(named, origin)

    def container(self, file: File) -> Container:
        return open_container(file.path, self.columns)


class Strict(string.Formatter):
    """`str.format` that takes words and numbers only: a hole in a table must not be learned as 'None'."""

    def get_field(self, field_name: str, args: Any, kwargs: Any) -> Any:
        value, used = super().get_field(field_name, args, kwargs)
        if value is None:
            raise ValueError(f"{field_name} is empty")
        return value, used

    def format_field(self, value: Any, format_spec: str) -> Any:
        if not isinstance(value, str | int | float):
            raise ValueError(f"a template needs words or a number, found {str(value)[:80]!r}")
        return super().format_field(value, format_spec)


def fill(template: str, record: Any) -> str:
    """The template with the record's values in it."""
    return text_of(Strict().vformat(template, *arguments(record)), template)


def arguments(record: Any) -> tuple[list[Any], dict[str, Any]]:
    """What a template may name: the keys of a mapping, the places of a list."""
    return (record, {}) if isinstance(record, list) else ([], record)
