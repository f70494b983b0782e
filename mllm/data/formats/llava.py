"""LLaVA's JSON: a list of `{id, image, conversations: [{from, value}, ...]}` beside a folder of images.

Enters: the file and its image folder. Leaves: one `Sample` a record. `image` may be a name or a list of names, or be
absent (text only); `from` is `human` or `gpt` (or the roles' plain names); `<image>` in a value marks an image's
place.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mllm.data.formats.source import Source, check, mapping, split_at_images
from mllm.types import Message, Sample

ROLES = {"human": "user", "gpt": "assistant", "user": "user", "assistant": "assistant", "system": "system"}
OWN_KEYS = {"id", "image", "images", "conversations"}


@dataclass
class LlavaSource(Source):
    """LLaVA conversations and an image folder."""

    format: Literal["llava"] = "llava"

    def samples(self, record: Any, where: str, default_id: str) -> Iterator[Sample]:
        record = mapping(record)
        names = record.get("image") or record.get("images") or []
        yield check(
            Sample(
                id=str(record.get("id", default_id)),
                messages=[message(turn) for turn in record["conversations"]],
                images=[self.image(name) for name in ([names] if isinstance(names, str) else names)],
                where=where,
                meta={key: value for key, value in record.items() if key not in OWN_KEYS},
            )
        )


def message(turn: dict[str, str]) -> Message:
    """One turn of a LLaVA conversation."""
    if turn["from"] not in ROLES:
        raise ValueError(f"unknown speaker {turn['from']!r}: expected one of {', '.join(ROLES)}")
    return Message(ROLES[turn["from"]], split_at_images(turn["value"]))


def read_llava(path: Path, image_dir: Path | None = None) -> list[Sample]:
    """Every sample of a file that must be whole, as a benchmark must; raises the first fault."""
    samples = []
    for item in LlavaSource(path=Path(path), image_dir=image_dir).read():
        if isinstance(item, ValueError):
            raise item
        samples.append(item)
    return samples
