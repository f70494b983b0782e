"""Documents with images between their words, as OBELICS and MMC4 collect them from the web.

Enters: records of two lists of one length, `texts` and `images`, of which one or the other has an entry at each place
(OBELICS), or of `text_list` and `image_info` (MMC4). Leaves: one `Sample` a document. All of its words are learned:
the whole document is what the assistant says, after a user who says nothing, since most chat templates want one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from mllm.data.formats.record import check, id_of, mapping, rest, sequence, text_of
from mllm.data.formats.source import Origin, Source
from mllm.types import IMAGE_TOKEN, Mark, Message, Sample

OWN_KEYS = {"id", "__key__", "texts", "images", "text_list", "image_info"}


@dataclass
class InterleavedSource(Source):
    """Documents of words and images."""

    format: Literal["interleaved"] = "interleaved"

    @classmethod
    def recognises(cls, record: dict[str, Any]) -> bool:
        texts, images = record.get("texts"), record.get("images")
        parallel = isinstance(texts, list) and isinstance(images, list) and len(texts) == len(images) > 0
        if parallel and all(text is None or isinstance(text, str) for text in texts or []):
            return True
        return isinstance(record.get("text_list"), list) and isinstance(record.get("image_info"), list)

    def samples(self, record: Any, origin: Origin) -> Iterator[Sample]:
        record = mapping(record)
        pieces = matched(record) if "text_list" in record else parallel(record)
        content: list[str | Mark] = []
        for words, image in pieces:
            if image is not None:
                content.append(Mark.IMAGE)
            elif content and isinstance(content[-1], str):
                content[-1] += "\n\n" + words
            else:
                content.append(words)
        yield check(
            Sample(
                id=id_of(record, origin.id),
                messages=[Message("user", []), Message("assistant", content)],
                images=[self.locate(image, origin) for _, image in pieces if image is not None],
                where=origin.where,
                meta=rest(record, OWN_KEYS),
            )
        )


def parallel(record: dict[str, Any]) -> list[tuple[str, Any]]:
    """(words, None) or ("", image) in the order of OBELICS' lists."""
    texts, images = sequence(record["texts"], "texts"), sequence(record["images"], "images")
    if len(texts) != len(images):
        raise ValueError(f"{len(texts)} texts and {len(images)} images: lists of one length, with null in the holes")
    for place, (text, image) in enumerate(zip(texts, images, strict=True)):
        if (text is None) == (image is None):
            raise ValueError(f"place {place} holds {'neither' if text is None else 'both'} of text and image")
    return [(plain(text), None) if image is None else ("", image) for text, image in zip(texts, images, strict=True)]


def matched(record: dict[str, Any]) -> list[tuple[str, Any]]:
    """The same from MMC4, where each image stands before the sentence that it was matched with."""
    before: dict[int, list[tuple[str, Any]]] = {}
    for image in map(mapping, sequence(record["image_info"], "image_info")):
        name = image.get("image_name") or image["raw_url"]
        before.setdefault(image["matched_text_index"], []).append(("", name))
    texts = sequence(record["text_list"], "text_list")
    if lost := before.keys() - range(len(texts)):
        raise ValueError(f"an image is matched with text {min(lost)}, but there are {len(texts)} texts")
    return [piece for i, text in enumerate(texts) for piece in (*before.get(i, []), (plain(text), None))]


def plain(text: Any) -> str:
    """Words of a web page, which may not pass for an image's place."""
    return text_of(text, "texts").replace(IMAGE_TOKEN, "")
