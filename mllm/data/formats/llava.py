"""LLaVA's JSON and ShareGPT's: `{id, image, conversations: [{from, value}, ...]}` beside a folder of images.

Enters: the file and its image folder. Leaves: one `Sample` a record. `image` may be a name or a list of names, or be
absent (text only); who speaks stands under `from` or `role`, by any of the names in `ROLES`, the words under `value`
or `content`; `<image>` in the words marks an image's place, `<video>` that of a `video` (a file, or a list of its
frames; several in a list `videos`), which lies beside the images.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mllm.data.formats.record import (
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

ROLES = {
    **{"human": "user", "gpt": "assistant", "user": "user", "assistant": "assistant", "system": "system"},
    **{"bot": "assistant", "chatgpt": "assistant", "model": "assistant"},
}
OWN_KEYS = {"id", "__key__", "image", "images", "video", "videos", "conversations", "conversation", "system"}


@dataclass
class LlavaSource(Source):
    """LLaVA conversations and an image folder."""

    format: Literal["llava"] = "llava"
    bare: bool = False
    """Replace each user turn by its bare image, as LLaVA's first stage does: the answer is then a caption."""

    @classmethod
    def recognises(cls, record: dict[str, Any]) -> bool:
        return isinstance(record.get("conversations") or record.get("conversation"), list)

    def samples(self, record: Any, origin: Origin) -> Iterator[Sample]:
        record = mapping(record)
        names = names_of(record.get("image") or record.get("images") or None)
        key = "conversation" if "conversation" in record and "conversations" not in record else "conversations"
        videos, places = videos_of(record), list[Any]()
        turns = [message(mapping(turn), places, bool(videos), self.bare) for turn in sequence(record[key], key)]
        if record.get("system"):  # LLaMA-Factory keeps it beside the turns
            turns.insert(0, Message("system", [text_of(record["system"], "system")]))
        yield check(
            Sample(
                id=id_of(record, origin.id),
                messages=turns,
                images=[self.locate(name, origin) for name in named(places, names, videos)],
                where=origin.where,
                meta=rest(record, OWN_KEYS),
            )
        )


def message(turn: dict[str, Any], places: list[Any], videos: bool, bare: bool = False) -> Message:
    """One turn of a conversation; of a `bare` user turn only the images are kept. What stands in each image's place
    is appended to `places`."""
    who, said = ("role", "content") if "role" in turn and "from" not in turn else ("from", "value")
    if turn[who] not in ROLES:
        raise ValueError(f"unknown speaker {turn[who]!r}: expected one of {', '.join(ROLES)}")
    role, (content, shown) = ROLES[turn[who]], split_at_media(text_of(turn[said], said), videos)
    places += shown
    if bare and role == "user":
        content = [part for part in content if part is Mark.IMAGE]
    return Message(role, content)


def read_llava(path: Path, image_dir: Path | None = None) -> list[Sample]:
    """Every sample of a file that must be whole, as a benchmark must; raises the first fault."""
    samples = []
    for item in LlavaSource(path=Path(path), image_dir=image_dir).read():
        if isinstance(item, ValueError):
            raise item
        samples.append(item)
    return samples
