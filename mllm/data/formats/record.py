"""What the readers of all formats do with one raw record: take its parts, and say what is wrong with them.

Enters: parts of a record that may be anything. Leaves: a mapping, a list, a text, or a `ValueError` that says what
stands there instead.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from itertools import islice
from typing import Any

from mllm.types import IMAGE_TOKEN, Mark, Sample, Video

VIDEO_TOKEN = "<video>"
"""The place of a video in the text of a record that has one; elsewhere these are plain characters."""
NAMELESS = Video("")
"""The place of a video whose name stands elsewhere in the record."""


class Filtered(ValueError):
    """A good record that the source was told to leave out: skipped and counted, but no fault."""


def mapping(record: Any) -> dict[str, Any]:
    """The record itself if it is a mapping, a `ValueError` that says what it is if not."""
    if isinstance(record, Exception):
        raise record
    if not isinstance(record, dict):
        raise ValueError(f"expected a JSON object, found {str(record)[:80]!r}: write it as {{key: value}}")
    return record


def sequence(value: Any, key: str) -> list[Any]:
    """The list that stands under a key, a `ValueError` that says what stands there if it is none."""
    if not isinstance(value, list):
        raise ValueError(f"`{key}` must be a list, found {str(value)[:80]!r}")
    return value


def names_of(value: Any) -> list[Any]:
    """The images of a record: none, one or several."""
    if value is None:
        return []
    return [value] if isinstance(value, str | bytes | dict) else sequence(value, "images")


def text_of(value: Any, key: str) -> str:
    """The words that stand under a key, a `ValueError` that says what stands there if they are none."""
    if not isinstance(value, str):
        raise ValueError(f"`{key}` must be text, found {str(value)[:80]!r}: write a string")
    if not encodable(value):
        raise ValueError(f"`{key}` is no text in UTF-8 ({value[:80]!a}): write the file in UTF-8")
    return value


def encodable(text: str) -> bool:
    """Whether it is whole: half a surrogate pair, which JSON can spell and which stands for bytes of another encoding,
    is taken by no tokenizer."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def id_of(record: dict[str, Any], default: str) -> str:
    """The record's own id, or the default where it has none; of a tar's record, shard and name."""
    if record.get("id") is not None:
        return str(record["id"])
    return default if record.get("__key__") is None else f"{default.rpartition('/')[0]}/{record['__key__']}"


def column(record: dict[str, Any], names: Iterable[str]) -> str | None:
    """The first of the names that is a key of the record, in small letters or capitals; None if none is."""
    keys = {str(key).lower(): key for key in record}
    return next((keys[name] for name in names if name in keys), None)


def rest(record: dict[str, Any], own: set[str]) -> dict[str, Any]:
    """What the record holds besides: small things, no files."""
    return {key: value for key, value in record.items() if key not in own and not isinstance(value, bytes)}


def fault(where: str, error: Exception, record: Any = None) -> ValueError:
    """The one form of message for a bad record: file, row, what is wrong."""
    text = str(error)
    if isinstance(error, KeyError):
        found = f" (it has: {', '.join(map(str, record))[:200]})" if isinstance(record, dict) and record else ""
        text = f"the key {error} is missing: add it, or check that `format` is this file's{found}"
    kind = Filtered if isinstance(error, Filtered) else ValueError
    return kind(f"{where}: {text}")


def split_at_images(text: str) -> list[str | Mark]:
    """`"<image>\\nWhat?"` -> `[Mark.IMAGE, "\\nWhat?"]`."""
    parts: list[str | Mark] = []
    for i, words in enumerate(text.split(IMAGE_TOKEN)):
        if i:
            parts.append(Mark.IMAGE)
        if words:
            parts.append(words)
    return parts


def split_at_media(text: str, videos: bool) -> tuple[list[str | Mark], list[Video | None]]:
    """The same, `<video>` being a place too where the record has videos; and of each place what stands there: a video
    that bears no name yet, or None for an image."""
    if not videos:
        content = split_at_images(text)
        return content, [None] * content.count(Mark.IMAGE)
    parts = re.split(f"({IMAGE_TOKEN}|{VIDEO_TOKEN})", text)
    places = [NAMELESS if part == VIDEO_TOKEN else None for part in parts[1::2]]
    return [Mark.IMAGE if at % 2 else part for at, part in enumerate(parts) if part], places


def videos_of(record: dict[str, Any]) -> list[Any]:
    """The videos of a record, each a name or a list of the names of its frames: those of a list `videos`, or one
    `video`; a list under `video` is that of its frames."""
    if record.get("videos"):
        return names_of(record["videos"])
    return [record["video"]] if record.get("video") else []


def named(places: list[Any], images: list[Any], videos: list[Any]) -> list[Any]:
    """What stands in each place, by name: its own, or the next of the record's lists; what is left over comes last, to
    be told of by `check`.

    LLaVA-Video writes `<image>` where its video stands: in a record of videos alone that is no other's place.
    """
    if videos and not images and not any(isinstance(place, Video) for place in places):
        places = [place or NAMELESS for place in places]
    shown, played = iter(images), map(as_video, videos)
    found: list[Any] = []
    for place in places:
        if place is None or place is NAMELESS:
            found += islice(shown if place is None else played, 1)
        else:
            found.append(place)
    return [*found, *shown, *played]


def as_video(name: Any) -> Video:
    """A video by its name, or by those of its frames; a list of one is that one."""
    if isinstance(name, list):
        return Video(name[0] if len(name) == 1 else tuple(name))
    return Video(name)


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
