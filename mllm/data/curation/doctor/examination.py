"""Everything that is wrong with a data set, found by reading all of it: every record, every image whole.

Enters: a source. Leaves: an `Examination`: what was read, and a `Finding` for each fault. No tokenizer is asked and
nothing is written; `classes` says what each class of fault means, `diagnosis` what the set as a whole has.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from mllm.data.crew import Tick, Walk, run_jobs
from mllm.data.curation.doctor.classes import Finding, class_of_image, class_of_record, odd_turns
from mllm.data.formats.source import Filtered, Place, Source
from mllm.data.images import open_image
from mllm.types import ImageSource, Sample

BLOCK = 64
"""Records that one worker of a shard takes in turn."""
REMEMBERED = 4096
"""Images kept by name: records about one picture follow each other."""
SQUARE = (256, 256)
"""What img2dataset makes of all images unless it is told otherwise."""
WHITE = 250
"""What JPEG leaves of a white border, at the least."""
TINY = 32
"""Pixels of a side below which little is left of a photograph: two patches of a usual encoder."""


class Look(NamedTuple):
    """What opening an image told."""

    width: int = 0
    height: int = 0
    bordered: bool = False
    """Whether two opposite edges are white."""
    fault: str = ""
    """Why it could not be opened."""


class Job(NamedTuple):
    """A shard, or one of the parts that several workers make of it."""

    shard: int
    part: int
    parts: int


@dataclass
class Examination:
    """What was read, and what was found."""

    records: int = 0
    filtered: int = 0
    samples: int = 0
    text_only: int = 0
    images: int = 0
    findings: list[Finding] = field(default_factory=list)
    sizes: np.ndarray = field(default_factory=lambda: np.empty((0, 2), np.int32))
    """[n, 2]: width and height of the images that could be opened, in no order."""
    bordered: int = 0
    """Squares of img2dataset's size with white borders."""
    names: np.ndarray = field(default_factory=lambda: np.empty((0, 5), np.int64))
    """[records, 5]: a hash of the id; shard, start, size, row."""


def examine(source: Source, workers: int, images: bool = True) -> Examination:
    """Read everything; without `images` these stay closed."""
    shards = len(source.files())
    parts = max(1, workers // shards)
    jobs = [Job(shard, part, parts) for shard in range(shards) for part in range(parts)]
    size = sum(file.path.stat().st_size for file in source.files())
    found = dict(run_jobs(Examiner(source, images), jobs, workers, "reading", size, "samples"))
    return joined([found[number] for number in range(len(jobs))])


def joined(parts: list[Examination]) -> Examination:
    """The parts as if one worker had read all of it, findings in no order."""
    whole = Examination()
    for part in parts:
        for name in ("records", "filtered", "samples", "text_only", "images", "bordered", "findings"):
            setattr(whole, name, getattr(whole, name) + getattr(part, name))
    whole.sizes = np.concatenate([part.sizes for part in parts])
    whole.names = np.concatenate([part.names for part in parts])
    return whole


class Examiner:
    """Examines one job after the other."""

    def __init__(self, source: Source, images: bool) -> None:
        self.source, self.images = source, images
        self.seen: dict[str, Look] = {}

    def __call__(self, job: Job, tick: Tick) -> Examination:
        file = self.source.files()[job.shard]
        found, sizes, names = Examination(), array("i"), array("q")
        walk = Walk(tick, file.path.stat().st_size, job.parts)
        try:
            for place, item in self.share(job):
                found.records += not place.part
                if isinstance(item, Sample):
                    if not place.part:
                        names.extend((digest(item.id), place.shard, place.start, place.size, place.row))
                    self.examine(item, Finding("", file.name, place.row, item.id, ""), found, sizes)
                else:
                    self.note(item, place, found)
                walk.at(place.start + place.size if place.size else 0, 1)
        except (ValueError, OSError) as error:  # every worker of the file meets it, one tells
            if job.part == 0:
                found.findings.append(Finding("broken file", file.name, None, "", str(error)))
        walk.finish()
        found.sizes = np.frombuffer(sizes, np.int32).reshape(-1, 2)
        found.names = np.frombuffer(names, np.int64).reshape(-1, 5)
        return found

    def share(self, job: Job) -> Iterator[tuple[Place, Sample | ValueError]]:
        """The records of a shard that are this job's."""
        for place, item in self.source.scan(job.shard):
            if place.row // BLOCK % job.parts == job.part:
                yield place, item

    def note(self, error: ValueError, place: Place, found: Examination) -> None:
        """A record that gives no sample."""
        if isinstance(error, Filtered):
            found.filtered += 1
            return
        cause = str(error).removeprefix(f"{self.source.origin(place.shard, place.row).where}: ")
        name = self.source.files()[place.shard].name
        found.findings.append(Finding(class_of_record(cause), name, place.row, "", cause))

    def examine(self, sample: Sample, here: Finding, found: Examination, sizes: array[int]) -> None:
        """A sample that its format took for good; `here` is a finding without class and cause."""
        found.samples += 1
        found.text_only += not sample.images
        found.images += len(sample.images)
        found.findings += [here._replace(kind=kind, cause=cause) for kind, cause in odd_turns(sample)]
        for image in sample.images if self.images else ():
            look = self.look(image)
            if look.fault:
                found.findings.append(here._replace(kind=class_of_image(look.fault), cause=look.fault))
                continue
            sizes.extend((look.width, look.height))
            found.bordered += look.bordered
            if min(look.width, look.height) < TINY:
                cause = f"an image has {look.width} x {look.height} pixels"
                found.findings.append(here._replace(kind="small picture", cause=cause))

    def look(self, image: ImageSource) -> Look:
        """Open an image, or remember how that went the last time."""
        if not isinstance(image, str | Path):
            return look_at(image)
        name = str(image)
        if name not in self.seen:
            if len(self.seen) == REMEMBERED:
                self.seen.clear()
            self.seen[name] = look_at(name)
        return self.seen[name]


def look_at(image: ImageSource) -> Look:
    """Decode an image whole."""
    try:
        pixels = open_image(image)
    except ValueError as error:
        return Look(fault=str(error))
    return Look(*pixels.size, pixels.size == SQUARE and bordered(pixels))


def bordered(image: Image.Image) -> bool:
    """Whether the first and last rows, or columns, are white."""
    pixels = np.asarray(image)
    edges = [pixels[0], pixels[-1]], [pixels[:, 0], pixels[:, -1]]
    return any(all(edge.min() >= WHITE for edge in pair) for pair in edges)


def digest(text: str) -> int:
    """64 bits of a text: two of a million texts are equal once in forty million data sets."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little", signed=True)
