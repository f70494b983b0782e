"""Questions and answers about the images of a record, as The Cauldron and FineVision keep them.

Enters: records of `images` and `texts`, the latter a list of `{user, assistant, ...}`. Leaves: one `Sample` each: a
turn of user and assistant for each text, the images in front of the first one (as FineVision's authors do), unless
the words say `<image>` where they belong. FineVision's ratings may leave records out; its authors found that all of
the data trained best, so nothing is left out unless asked for.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal

from mllm.data.formats.record import (
    Filtered,
    check,
    id_of,
    mapping,
    names_of,
    rest,
    sequence,
    split_at_images,
    text_of,
)
from mllm.data.formats.source import Origin, Source
from mllm.schema import Schema
from mllm.types import Mark, Message, Sample

OWN_KEYS = {"id", "__key__", "image", "images", "texts"}


@dataclass
class MinRating(Schema):
    """The least of each of FineVision's ratings, 1 to 5, that every turn of a record must have; 0 asks for none."""

    relevance: int = 0
    image_correspondence: int = 0
    visual_dependency: int = 0
    formatting: int = 0


@dataclass
class TextsImagesSource(Source):
    """Lists of images and of questions with answers."""

    format: Literal["texts_images"] = "texts_images"
    min_rating: MinRating | None = None
    """Leave out records whose worst turn is rated lower (columns such as `relevance_min`)."""

    @classmethod
    def recognises(cls, record: dict[str, Any]) -> bool:
        texts = record.get("texts")
        return isinstance(texts, list) and bool(texts) and all(isinstance(text, dict) for text in texts)

    def samples(self, record: Any, origin: Origin) -> Iterator[Sample]:
        record = mapping(record)
        if self.min_rating:
            leave_out(record, self.min_rating)
        names = names_of(record.get("images") or record.get("image"))
        messages = [said for text in sequence(record["texts"], "texts") for said in turns(mapping(text))]
        if messages and not any(message.num_images for message in messages):
            messages[0].content[:0] = [Mark.IMAGE] * len(names)
        yield check(
            Sample(
                id=id_of(record, origin.id),
                messages=messages,
                images=[self.locate(name, origin) for name in names],
                where=origin.where,
                meta=rest(record, OWN_KEYS),
            )
        )


def turns(text: dict[str, Any]) -> list[Message]:
    return [Message(role, split_at_images(text_of(text[role], role))) for role in ("user", "assistant")]


def leave_out(record: dict[str, Any], least: MinRating) -> None:
    """Raise `Filtered` for a record that is rated too low, or not at all."""
    for name, rating in asdict(least).items():
        if rating:
            given = record[f"{name}_min"]
            if given is None or given < rating:
                raise Filtered(f"left out: {name} is rated {given}, min_rating asks for {rating}")
