"""COCO's annotation file: one JSON object whose `annotations` are captions of its `images`.

Enters: `captions_train2017.json` and the folder of its images. Leaves: one `Sample` a caption, as from `captions`.
The file is read piece by piece; what stays in memory is a name for each image.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mllm.data.containers import Container
from mllm.data.containers.json_lines import parse, read_at
from mllm.data.containers.json_list import JsonText
from mllm.data.files import File
from mllm.data.formats.record import check, mapping, text_of
from mllm.data.formats.source import Origin, Source
from mllm.types import Mark, Message, Sample


@dataclass
class CocoSource(Source):
    """COCO captions."""

    format: Literal["coco"] = "coco"
    prompt: str = ""
    """Words after the image in the user's turn; none by default."""

    def samples(self, record: Any, origin: Origin) -> Iterator[Sample]:
        record = mapping(record)
        shown = Message("user", [Mark.IMAGE, self.prompt] if self.prompt else [Mark.IMAGE])
        yield check(
            Sample(
                id=f"{record['image_id']}#{record['id']}",
                messages=[shown, Message("assistant", [text_of(record["caption"], "caption")])],
                images=[self.locate(record["file_name"], origin)],
                where=origin.where,
            )
        )

    def container(self, file: File) -> Container:
        return Annotations(file.path)


def is_coco(path: Path) -> bool:
    """Whether the file is one object whose `images` are described as COCO does."""
    with path.open("rb") as file:
        text = JsonText(file)
        try:
            for name in text.members():
                if name == "images":
                    text.expect("[")
                    first = next(text.elements(), (0, 0, None))[2]
                    return isinstance(first, dict) and "file_name" in first
                text.skip()
        except (ValueError, RecursionError):
            pass
    return False


class Annotations:
    """The annotations as records, each with its image's `file_name`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.file = path.open("rb")
        self.names = {image["id"]: image["file_name"] for _, _, image in self.listed("images")}

    def scan(self) -> Iterator[tuple[int, int, Any]]:
        for start, size, annotation in self.listed("annotations"):
            yield start, size, self.named(annotation)

    def fetch(self, start: int, size: int) -> Any:
        return self.named(parse(read_at(self.file.fileno(), start, size)))

    def named(self, annotation: Any) -> Any:
        if not isinstance(annotation, dict):
            return annotation
        image = annotation.get("image_id")
        if image not in self.names:
            return ValueError(
                f"the annotation is of image {image!r}, which is not among the {len(self.names)} `images`"
            )
        return {**annotation, "file_name": self.names[image]}

    def listed(self, key: str) -> Iterator[tuple[int, int, Any]]:
        """The elements of the list under a key of the file's one object."""
        with self.path.open("rb") as file:
            text = JsonText(file)
            try:
                for name in text.members():
                    if name == key:
                        text.expect("[")
                        yield from text.elements()
                        return
                    text.skip()
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{self.path} is no whole COCO file ({error}): write or download it again") from error
        raise ValueError(f"{self.path} has no `{key}`: COCO's caption files have `images` and `annotations`")
