"""OpenAI-style chat: JSON lines of `{messages: [{role, content}]}` whose content is a string or a list of parts.

Enters: the file. Leaves: one `Sample` a line. Parts are `{type: text, text}`, `{type: image_url, image_url: {url}}`
(or a bare string) and `{type: image, image: path}`; a path, a URL and a data URI are all images. A record may
instead keep its images in a list `images`, with `{type: image}` parts or `<image>` in the text marking their places.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from mllm.data.formats.source import Source, check, mapping, split_at_images
from mllm.types import Mark, Message, Sample

ROLES = ("system", "user", "assistant")
OWN_KEYS = {"id", "messages", "images"}


@dataclass
class MessagesSource(Source):
    """OpenAI-style messages with image parts."""

    format: Literal["messages"] = "messages"

    def samples(self, record: Any, where: str, default_id: str) -> Iterator[Sample]:
        record = mapping(record)
        names: list[str] = []
        messages = [message(turn, names) for turn in record["messages"]]
        yield check(
            Sample(
                id=str(record.get("id", default_id)),
                messages=messages,
                images=[self.image(name) for name in names + list(record.get("images", []))],
                where=where,
                meta={key: value for key, value in record.items() if key not in OWN_KEYS},
            )
        )


def message(turn: dict[str, Any], names: list[str]) -> Message:
    """One turn; the images that its parts bring along are appended to `names` in order."""
    if turn["role"] not in ROLES:
        raise ValueError(f"unknown role {turn['role']!r}: expected one of {', '.join(ROLES)}")
    if isinstance(turn["content"], str):
        return Message(turn["role"], split_at_images(turn["content"]))
    content: list[str | Mark] = []
    for part in turn["content"]:
        content += words_or_image(part, names)
    return Message(turn["role"], content)


def words_or_image(part: dict[str, Any], names: list[str]) -> list[str | Mark]:
    """One content part as words, or as an image's place (its name, if it carries one, goes to `names`)."""
    if part["type"] == "text":
        return split_at_images(part["text"])
    if part["type"] not in ("image_url", "image"):
        raise ValueError(f"unknown content part {part['type']!r}: expected text, image_url or image")
    name = part.get("image_url") or part.get("image") or part.get("url")
    if isinstance(name, dict):
        name = name["url"]
    if name:
        names.append(name)
    return [Mark.IMAGE]
