"""No `format` at all: the records say what they are.

Enters: a path. Leaves: the samples of the one format whose keys the first records have. Options belong to formats:
whoever sets one names its format.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal

from mllm.data.containers import Container, open_container
from mllm.data.files import File
from mllm.data.formats.captions import CaptionsSource
from mllm.data.formats.coco import CocoSource, is_coco
from mllm.data.formats.interleaved import InterleavedSource
from mllm.data.formats.llava import LlavaSource
from mllm.data.formats.messages import MessagesSource
from mllm.data.formats.source import Origin, Source
from mllm.data.formats.texts_images import TextsImagesSource
from mllm.types import Sample

FORMATS: dict[str, type[Source]] = {
    "llava": LlavaSource,
    "messages": MessagesSource,
    "captions": CaptionsSource,
    "texts_images": TextsImagesSource,
    "interleaved": InterleavedSource,
}
LOOKED_AT = 16
"""Records that are asked what they are."""


@dataclass
class AutoSource(Source):
    """Records whose format is seen from their keys."""

    format: Literal["auto"] = "auto"

    def samples(self, record: Any, origin: Origin) -> Iterator[Sample]:
        return self.chosen().samples(record, origin)

    def container(self, file: File) -> Container:
        return self.chosen().container(file)

    def chosen(self) -> Source:
        """The source with its format."""
        if "chosen" not in self.kept():
            kind = recognise(self.files()[0])
            self.kept()["chosen"] = kind(self.path, self.image_dir, self.split, self.subset)
        chosen: Source = self.kept()["chosen"]
        return chosen


def recognise(file: File) -> type[Source]:
    """The format of a file.

    Raises:
        ValueError: there is no record, or none fits, or several do; says which keys the records have.
    """
    if is_coco(file.path):
        return CocoSource
    records = [record for _, _, record in islice(open_container(file.path).scan(), LOOKED_AT)]
    fitting = [fits for record in records if (fits := formats_of(record))]
    common = [name for name in FORMATS if fitting and all(name in fits for fits in fitting)]
    if len(common) == 1:
        return FORMATS[common[0]]
    if not records:
        raise ValueError(f"{file.name} holds no records: is it the file that was meant, and was it written to its end?")
    keys = list(dict.fromkeys(str(key) for record in records if isinstance(record, dict) for key in record))
    found = f"fits several formats ({', '.join(common)})" if common else "is of no known format"
    raise ValueError(
        f"{file.name} {found}: its records have the keys {', '.join(keys)[:300] or '(none)'}. Set `format` to one of "
        f"{', '.join(FORMATS)}, or to `fields`, which reads any table by templates"
    )


def formats_of(record: Any) -> list[str]:
    return [name for name, kind in FORMATS.items() if isinstance(record, dict) and kind.recognises(record)]
