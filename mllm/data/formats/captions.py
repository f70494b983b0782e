"""Captions: JSON lines of `{image, caption}` or `{image, captions: [...]}`, the food of the align stage.

Enters: the file and its image folder. Leaves: one `Sample` a caption: the user shows the image (after `prompt`, if
one is set), the assistant says the caption. LLaVA-1.5's first stage does the same: the human turn is the bare image.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from mllm.data.formats.source import Source, check, id_of, mapping, sequence, text_of
from mllm.types import Mark, Message, Sample

OWN_KEYS = {"id", "image", "caption", "captions"}


@dataclass
class CaptionsSource(Source):
    """Images with one caption or several."""

    format: Literal["captions"] = "captions"
    prompt: str = ""
    """Words after the image in the user's turn; none by default."""

    def samples(self, record: Any, where: str, default_id: str) -> Iterator[Sample]:
        record = mapping(record)
        several = record.get("captions") is not None
        captions = sequence(record["captions"], "captions") if several else [record["caption"]]
        if not captions:
            raise ValueError("no caption: `captions` is empty")
        shown = Message("user", [Mark.IMAGE, self.prompt] if self.prompt else [Mark.IMAGE])
        for k, caption in enumerate(captions):
            yield check(
                Sample(
                    id=f"{id_of(record, default_id)}#{k}",
                    messages=[shown, Message("assistant", [text_of(caption, "caption")])],
                    images=[self.image(record["image"])],
                    where=where,
                    meta={key: value for key, value in record.items() if key not in OWN_KEYS},
                )
            )
