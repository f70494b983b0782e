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

from mllm.data.formats.source import Source, check, id_of, mapping, names_of, sequence, split_at_images, text_of
from mllm.types import Mark, Message, Sample

ROLES = {"human": "user", "gpt": "assistant", "user": "user", "assistant": "assistant", "system": "system"}
OWN_KEYS = {"id", "image", "images", "conversations"}


@dataclass
class LlavaSource(Source):
    """LLaVA conversations and an image folder."""

    format: Literal["llava"] = "llava"
    bare: bool = False
    """Replace each user turn by its bare image, as LLaVA's first stage does: the answer is then a caption."""

    def samples(self, record: Any, where: str, default_id: str) -> Iterator[Sample]:
        record = mapping(record)
        names = names_of(record.get("image") or record.get("images") or None)
        yield check(
            Sample(
                id=id_of(record, default_id),
                messages=[
                    message(mapping(turn), self.bare) for turn in sequence(record["conversations"], "conversations")
                ],
                images=[self.image(name) for name in names],
                where=where,
                meta={key: value for key, value in record.items() if key not in OWN_KEYS},
            )
        )


def message(turn: dict[str, Any], bare: bool = False) -> Message:
    """One turn of a LLaVA conversation; of a `bare` user turn only the images are kept."""
    if turn["from"] not in ROLES:
        raise ValueError(f"unknown speaker {turn['from']!r}: expected one of {', '.join(ROLES)}")
    content = split_at_images(text_of(turn["value"], "value"))
    if bare and ROLES[turn["from"]] == "user":
        content = [part for part in content if part is Mark.IMAGE]
    return Message(ROLES[turn["from"]], content)


def read_llava(path: Path, image_dir: Path | None = None) -> list[Sample]:
    """Every sample of a file that must be whole, as a benchmark must; raises the first fault."""
    samples = []
    for item in LlavaSource(path=Path(path), image_dir=image_dir).read():
        if isinstance(item, ValueError):
            raise item
        samples.append(item)
    return samples
