"""OpenAI-style chat: `{messages: [{role, content}]}` whose content is a string or a list of parts.

Enters: records. Leaves: one `Sample` each. Parts are `{type: text, text}`, `{type: image_url, image_url: {url}}` (or
a bare string) and `{type: image, image: path}`; a path, a URL and a data URI are all images, and so are bytes. A
record may instead keep its images in a list `images` (or one as `image`), with `{type: image}` parts or `<image>` in
the text marking their places, as TRL, LLaMA-Factory and ms-swift have it. Videos go the same way: `{type: video,
video|path|url}` (a file, or a list of its frames), `{type: video_url}`, a list `videos` with `<video>` in the text.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from mllm.data.formats.record import (
    NAMELESS,
    as_video,
    check,
    id_of,
    mapping,
    named,
    names_of,
    rest,
    sequence,
    split_at_media,
    text_of,
    videos_of,
)
from mllm.data.formats.source import Origin, Source
from mllm.types import Mark, Message, Sample

ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
"""Who speaks, and which role of a chat template that is; OpenAI calls the system `developer` since its o1."""
OWN_KEYS = {"id", "__key__", "messages", "images", "image", "videos", "video"}
KINDS = ("image_url", "image", "video_url", "video")


@dataclass
class MessagesSource(Source):
    """OpenAI-style messages with image parts."""

    format: Literal["messages"] = "messages"

    @classmethod
    def recognises(cls, record: dict[str, Any]) -> bool:
        return isinstance(record.get("messages"), list)

    def samples(self, record: Any, origin: Origin) -> Iterator[Sample]:
        record = mapping(record)
        names: list[Any] = []
        videos = videos_of(record)
        messages = [message(mapping(turn), names, bool(videos)) for turn in sequence(record["messages"], "messages")]
        listed = names_of(record.get("images") or record.get("image"))
        yield check(
            Sample(
                id=id_of(record, origin.id),
                messages=messages,
                images=[self.locate(name, origin) for name in named(names, listed, videos)],
                where=origin.where,
                meta=rest(record, OWN_KEYS),
            )
        )


def message(turn: dict[str, Any], names: list[Any], videos: bool) -> Message:
    """One turn; for each image's place, the name that it brings along is appended to `names`, or None."""
    if turn["role"] not in ROLES:
        raise ValueError(f"unknown role {turn['role']!r}: expected one of {', '.join(ROLES)}")
    parts = turn["content"]
    if isinstance(parts, str):
        parts = [{"type": "text", "text": parts}]
    content: list[str | Mark] = []
    for part in sequence(parts, "content"):
        content += words_or_image(mapping(part), names, videos)
    return Message(ROLES[turn["role"]], content)


def words_or_image(part: dict[str, Any], names: list[Any], videos: bool) -> list[str | Mark]:
    """One content part as words, or as an image's place (its name, None if it carries none, goes to `names`)."""
    if part["type"] == "text":
        words, places = split_at_media(text_of(part["text"], "text"), videos)
        names += places
        return words
    kind = part["type"]
    if kind not in KINDS:
        raise ValueError(f"unknown content part {kind!r}: expected text, image_url or image, video_url or video")
    kind = kind.removesuffix("_url")
    name = part.get(f"{kind}_url") or part.get(kind) or part.get("url") or part.get("path")
    if isinstance(name, dict) and not name.get("bytes") and not name.get("path"):
        name = name["url"]
    if kind == "video":
        name = as_video(name) if name else NAMELESS
    names.append(name or None)
    return [Mark.IMAGE]
