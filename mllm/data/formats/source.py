"""What every source of samples has in common: its files, where each sample lies in them, and the way back to it.

Enters: a path and, where images are named by relative paths, their folder. Leaves: the base class that a format
inherits, which says only what a record means (`samples`). `scan` goes through a shard once and tells the `Place` of
each sample; `fetch` goes to such a place directly, in any process, in any order.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from mllm.data.containers import Container, open_container
from mllm.data.files import File, find, is_url
from mllm.data.formats.record import Filtered as Filtered
from mllm.data.formats.record import fault
from mllm.data.formats.record import split_at_images as split_at_images
from mllm.schema import Schema
from mllm.types import ImageSource, Sample, Video

OPEN_FILES = 64
"""Shards that a process keeps open; systems allow about a thousand files."""
FAULTS = (ValueError, KeyError, TypeError, AttributeError, IndexError)
"""What reading a record of the wrong shape raises."""


@dataclass(frozen=True)
class Place:
    """Where one sample lies: whole numbers, so that a million of them are columns."""

    shard: int
    """Number of the file in `source.shards()`."""
    start: int
    """Byte at which the record starts, or its number in a table."""
    size: int
    """Bytes of the record; 0 where records are numbered."""
    row: int
    """Number of the record in its shard, as errors tell it."""
    part: int = 0
    """Which of the record's samples."""


@dataclass(frozen=True)
class Origin:
    """What a format may know of where a record comes from."""

    where: str
    """File and row, for errors."""
    id: str
    """The id of a record that has none of its own."""
    folder: Path | str
    """Where relative paths start from: a folder, a zip archive, a URL."""


@dataclass
class Source(Schema):
    """Files of records; `format` in each subclass is the name that YAML uses."""

    path: Path | str
    """The file of records; or a folder, a glob, a URL (`s3://`, `gs://`, `hf://`), or `hub:OWNER/NAME`."""
    image_dir: Path | str | None = None
    """Folder or zip archive that relative image paths start from; the file's own folder where none is given."""
    split: str = ""
    """Which split, of a path that holds several."""
    subset: str = ""
    """Which part of a data set of the Hub that has several."""

    def __post_init__(self) -> None:
        self.path = as_path(self.path)
        self.image_dir = None if self.image_dir is None else as_path(self.image_dir)

    @property
    def name(self) -> str:
        """The last part of the path, for labels."""
        return str(self.path).rstrip("/").rpartition("/")[2]

    def shards(self) -> list[Path]:
        """The files, on this machine, in a fixed order."""
        return [file.path for file in self.files()]

    def scan(self, shard: int) -> Iterator[tuple[Place, Sample | ValueError]]:
        """Yield each sample of a shard with its place, in order, and for each bad record one `ValueError` that names
        file and row (a `Filtered` if it is left out on purpose).

        Raises:
            ValueError: the file as a whole is broken.
        """
        for row, (start, size, record) in enumerate(self.container(self.files()[shard]).scan()):
            origin = self.origin(shard, row)
            try:
                samples = list(self.samples(record, origin))
            except FAULTS as error:
                yield Place(shard, start, size, row), fault(origin.where, error, record)
            else:
                for part, sample in enumerate(samples):
                    yield Place(shard, start, size, row, part), sample

    def fetch(self, place: Place) -> Sample:
        """The sample that `scan` gave there.

        Raises:
            ValueError: it is not there any more; names file and row.
        """
        origin = self.origin(place.shard, place.row)
        record: Any = None
        try:
            record = self.opened(place.shard).fetch(place.start, place.size)
            samples = list(self.samples(record, origin))
            if place.part >= len(samples):
                raise ValueError(
                    f"{len(samples)} samples in the record, fewer than when it was indexed: index it again"
                )
            return samples[place.part]
        except (*FAULTS, OSError) as error:
            raise fault(origin.where, error, record) from error

    def read(self) -> Iterator[Sample | ValueError]:
        """Yield all samples and bad records of all shards, in order."""
        for shard in range(len(self.files())):
            for _, item in self.scan(shard):
                yield item

    @classmethod
    def recognises(cls, record: dict[str, Any]) -> bool:
        """Whether the keys of a record are those of this format."""
        return False

    def samples(self, record: Any, origin: Origin) -> Iterator[Sample]:
        """Yield what one raw record holds."""
        raise NotImplementedError(f"{type(self).__name__} must say how a record becomes samples")

    def kinds(self) -> dict[str, float]:
        """Weights of the kinds of caption, by `Sample.variant`, where a record's samples are kinds of one caption."""
        return {}

    def container(self, file: File) -> Container:
        """The records of a file."""
        return open_container(file.path)

    def locate(self, named: Any, origin: Origin) -> ImageSource:
        """Where an image lies, or its bytes; URLs and data URIs stay as they are. Of a video, or each of its frames,
        the same."""
        if isinstance(named, Video):
            frames = named.source
            return Video(
                tuple(self.locate(one, origin) for one in frames)
                if isinstance(frames, tuple)
                else self.locate(frames, origin)
            )
        if isinstance(named, dict):  # how `datasets` keeps an image
            named = named.get("bytes") or named.get("path") or named.get("url")
        if isinstance(named, bytes) and named:
            return named
        if not isinstance(named, str) or not named:
            raise ValueError(f"an image is named {str(named)[:80]!r}: give a path, a URL or a data URI")
        if is_url(named) or named.startswith("data:"):
            return named
        if is_url(origin.folder):
            return f"{origin.folder}/{named}"
        folder = Path(origin.folder)
        return f"{folder}::{named}" if folder.suffix.lower() == ".zip" else folder / named

    def origin(self, shard: int, row: int) -> Origin:
        file = self.files()[shard]
        return Origin(f"{file.name}, row {row}", f"{file.stem}/{row}", self.images_from() or file.folder)

    def images_from(self) -> Path | str | None:
        """The image folder as it lies on this machine: an archive far away is fetched."""
        if self.image_dir is None or not str(self.image_dir).lower().endswith(".zip"):
            return self.image_dir
        if "images" not in self.kept():
            self.kept()["images"] = find(self.image_dir)[0].path
        archive: Path = self.kept()["images"]
        return archive

    def files(self) -> list[File]:
        """The shards, looked up once."""
        if "files" not in self.kept():
            self.kept()["files"] = find(self.path, self.split, self.subset)
        files: list[File] = self.kept()["files"]
        return files

    def opened(self, shard: int) -> Container:
        """The records of a shard; the shards used last stay open."""
        shards: dict[int, Container] = self.kept().setdefault("opened", {})
        container = shards.pop(shard, None) or self.container(self.files()[shard])
        shards[shard] = container
        if len(shards) > OPEN_FILES:
            del shards[next(iter(shards))]
        return container

    def kept(self) -> dict[str, Any]:
        """What this process found out and holds open."""
        kept: dict[str, Any] = self.__dict__.setdefault("_kept", {})
        if kept.get("process") != os.getpid():
            kept = self.__dict__["_kept"] = {**lasting(kept), "process": os.getpid()}
        return kept

    def __getstate__(self) -> dict[str, Any]:
        return {**{field.name: getattr(self, field.name) for field in fields(self)}, "_kept": lasting(self.kept())}


def lasting(kept: dict[str, Any]) -> dict[str, Any]:
    """What a worker takes over: the list of files, so that all have the same one; nothing that is open."""
    return {key: kept[key] for key in ("files", "images") if key in kept}


def labels(sources: Sequence[Source]) -> list[str]:
    """A name for each source, no two alike: its file's without the ending, or its folder's where the file is a glob."""
    seen: Counter[str] = Counter()
    told = []
    for source in sources:
        parts = [part for part in str(source.path).split("/") if part and not set(part) & set("*?[")]
        name = (Path(parts[-1]).stem if parts else source.name) + (f":{source.subset}" if source.subset else "")
        seen[name] += 1
        told.append(name if seen[name] == 1 else f"{name}-{seen[name]}")
    return told


def as_path(text: Path | str) -> Path | str:
    """A path, or a URL or Hub id, which must keep its slashes."""
    return text if is_url(text) or str(text).startswith("hub:") else Path(text)
