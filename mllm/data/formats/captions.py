"""Images with captions, the food of the align stage: JSON lines, CSV, TSV, Parquet, tars of img2dataset.

Enters: records with an image and a caption, or a list of captions, under any of the usual names. Leaves: one `Sample`
a caption: the user shows the image (after `prompt`, if one is set), the assistant says the caption. LLaVA-1.5's first
stage does the same: the human turn is the bare image. With `text`, captions are kinds of one another (alt text, a
short one, a dense one), and an epoch uses one of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from mllm.data.containers import Container, open_container
from mllm.data.files import File
from mllm.data.formats.record import check, column, id_of, mapping, rest, sequence, text_of
from mllm.data.formats.source import Origin, Source
from mllm.schema import NotNegative, Schema
from mllm.types import Mark, Message, Sample

IMAGE = (
    "image",
    *("jpg", "jpeg", "png", "webp"),  # img2dataset's tables of bytes, and `datasets` of tars
    *("image_path", "img_path", "image_file", "img", "filepath", "file_path", "file_name", "filename", "path"),
    *("image_url", "img_url", "url"),
)
"""Names of the column that holds the image or tells where it is, the likeliest first; in capitals too."""
CAPTION = ("caption", "text", "txt", "alt", "alt_text", "title", "description")
"""Names of the column of words, the likeliest first; in capitals too."""
CONVERSATION = {"conversations", "conversation", "messages", "texts", "text_list"}


@dataclass
class Kinds(Schema):
    """The kinds of caption that a record holds."""

    weights: dict[str, NotNegative]
    """How often each kind is used, relative to the others: {alt: 1, dense: 2}. A kind is the name of a column."""


@dataclass
class CaptionsSource(Source):
    """Images with one caption or several."""

    format: Literal["captions"] = "captions"
    prompt: str = ""
    """Words after the image in the user's turn; none by default."""
    text: Kinds | None = None
    """Kinds of caption of which an epoch uses one; without it each caption is a sample of its own."""
    columns: list[str] = field(default_factory=list)
    """Names for the columns of a CSV or TSV that does not name them in its first line."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.text and not sum(self.text.weights.values()):
            raise ValueError("text.weights must name a kind of caption with a weight above 0, as {alt: 1, dense: 2}")

    @classmethod
    def recognises(cls, record: dict[str, Any]) -> bool:
        several = isinstance(record.get("captions"), list)
        has = column(record, IMAGE) is not None and (several or column(record, CAPTION) is not None)
        return has and not CONVERSATION & record.keys()

    def samples(self, record: Any, origin: Origin) -> Iterator[Sample]:
        record = mapping(record)
        key = column(record, IMAGE) or "image"
        captions = self.variants(record) if self.text else numbered(record)
        own = {"id", "__key__", key, *(name for name, _, _ in captions)}
        shown = Message("user", [Mark.IMAGE, self.prompt] if self.prompt else [Mark.IMAGE])
        for name, mark, caption in captions:
            yield check(
                Sample(
                    id=f"{id_of(record, origin.id)}#{mark}",
                    messages=[shown, Message("assistant", [text_of(caption, name)])],
                    images=[self.locate(record[key], origin)],
                    where=origin.where,
                    meta=rest(record, own),
                    variant=mark if self.text else "",
                )
            )

    def variants(self, record: dict[str, Any]) -> list[tuple[str, str, Any]]:
        """(column, kind, words) of the kinds that the record has."""
        kinds = self.kinds()
        found = [(kind, kind, record[kind]) for kind in kinds if not empty(record.get(kind))]
        if not found:
            raise ValueError(f"no caption of the kinds {', '.join(kinds)}: it has {', '.join(record)[:200]}")
        return found

    def kinds(self) -> dict[str, float]:
        return {kind: weight for kind, weight in self.text.weights.items() if weight} if self.text else {}

    def container(self, file: File) -> Container:
        return open_container(file.path, self.columns)


def numbered(record: dict[str, Any]) -> list[tuple[str, str, Any]]:
    """(column, number, words) of the record's captions."""
    if record.get("captions") is not None:
        captions = sequence(record["captions"], "captions")
        if not captions:
            raise ValueError("no caption: `captions` is empty")
        return [("captions", str(k), caption) for k, caption in enumerate(captions)]
    key = column(record, CAPTION) or "caption"
    if isinstance(record[key], list):
        return [(key, str(k), caption) for k, caption in enumerate(record[key])]
    return [(key, "0", record[key])]


def empty(caption: Any) -> bool:
    return caption is None or (isinstance(caption, str) and not caption.strip())
