"""One shard of a source to a table of counts, a line for each sample and for each record that cannot be used.

Enters: a source, the number of a shard, a processor. Leaves: an Arrow table with the columns of `SCHEMA`, in the
order of the shard. Images are opened as far as their header; tokens are counted and forgotten.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from mllm.data.formats.source import Filtered, Place, Source
from mllm.data.images import image_size
from mllm.data.imaging.videos import num_frames
from mllm.data.processor import Processor
from mllm.types import IGNORE_INDEX, Sample, Video

if TYPE_CHECKING:
    from mllm.types import ImageSource

SCHEMA = pa.schema(
    {
        "id": pa.string(),  # null where the record could not be read so far
        "start": pa.int64(),
        "size": pa.int64(),
        "row": pa.int64(),
        "part": pa.int16(),
        "length": pa.int32(),  # tokens after cutting, visual tokens included
        "supervised": pa.int32(),
        "cut": pa.int32(),  # tokens that cutting took away
        "tiles": pa.int32(),  # what the encoder is handed for its images
        "sizes": pa.list_(pa.int32()),  # width, height of each image in turn
        "variant": pa.string(),
        "kind": pa.string(),  # null for a good sample, else the class of its fault
        "cause": pa.string(),  # as `kind`
    }
)
BLOCK = 256
"""Records that one helper of a shard takes in turn, and lines that become columns at a time."""
REMEMBERED = 4096
"""Image sizes kept by name: records about one picture follow each other."""

Line = dict[str, Any]
Tick = Callable[[int, int], None]
"""Told how many lines are new, and up to which byte of the shard they reach (0 where rows are numbered)."""


def measure_shard(
    source: Source,
    shard: int,
    processor: Processor,
    max_length: int,
    part: int = 0,
    parts: int = 1,
    tick: Tick = lambda lines, end: None,
) -> pa.Table:
    """The lines of a shard; of several `parts` this one's blocks only, with their number in a column `order`."""
    schema = SCHEMA.append(pa.field("order", pa.int64()))
    batches: list[pa.RecordBatch] = []
    lines: list[Line] = []
    sizes = Sizes()
    for order, (place, item) in enumerate(source.scan(shard)):
        if order // BLOCK % parts != part:
            continue
        if isinstance(item, Sample):
            line = measure(item, processor, max_length, sizes)
        else:
            line = bad_record(item, source.origin(shard, place.row).where)
        lines.append({**placed(place), **line, "order": order})
        if len(lines) == BLOCK:
            batches.append(pa.RecordBatch.from_pylist(lines, schema))
            tick(BLOCK, place.start + place.size if place.size else 0)
            lines = []
    tick(len(lines), 0)
    return pa.Table.from_batches([*batches, pa.RecordBatch.from_pylist(lines, schema)]).combine_chunks()


def join_parts(parts: list[pa.Table]) -> pa.Table:
    """The parts of one shard in the order of its lines: the same table as from one pass."""
    whole = pa.concat_tables(parts)
    if len(parts) > 1:
        whole = whole.sort_by("order")
    return whole.drop_columns("order").combine_chunks()


def placed(place: Place) -> Line:
    return {"start": place.start, "size": place.size, "row": place.row, "part": place.part}


def bad_record(error: ValueError, where: str) -> Line:
    """The line of a record that gives no sample."""
    kind = "filtered" if isinstance(error, Filtered) else "record"
    return {"kind": kind, "cause": str(error).removeprefix(f"{where}: ")}


def measure(sample: Sample, processor: Processor, max_length: int, sizes: Sizes) -> Line:
    """The counts of one sample, or why it cannot be used."""
    line: Line = {"id": sample.id, "variant": sample.variant}
    kind = "text"
    try:
        sample = processor.framed(sample)
        kept = processor.encoded(sample, max_length)
        kind = "image"
        line["sizes"] = [side for image in sample.images[: kept.images] for side in sizes(image)]
    except ValueError as error:
        kind = getattr(error, "kind", kind)
        return {**line, "kind": kind, "cause": str(error).removeprefix(f"{sample.where}: ")}
    line["length"], line["cut"], line["tiles"] = len(kept.input_ids), kept.cut, kept.tiles
    line["supervised"] = len(kept.labels) - 1 - kept.labels[1:].count(IGNORE_INDEX)
    return line


class Sizes:
    """Image sizes from headers, the last ones remembered by name."""

    def __init__(self) -> None:
        self.known: dict[ImageSource, tuple[int, int]] = {}

    def __call__(self, image: ImageSource) -> tuple[int, int]:
        if not isinstance(image, str | Path):
            return image_size(image)
        if image not in self.known:
            if len(self.known) == REMEMBERED:
                self.known.clear()
            self.known[image] = image_size(image)
        return self.known[image]


def mended(source: Source, lines: pa.Table, shard: int) -> bool:
    """Whether an image in the faults of a table can be read now: an image may be put right and its shard not know."""
    for line in faulty(lines, "image"):
        try:
            sample = source.fetch(Place(shard, line["start"], line["size"], line["row"], line["part"]))
            if any(str(image).startswith(("http://", "https://")) for image in sample.images):
                continue  # asking the network again at every start costs more than it gives
            for image in sample.images:
                num_frames(image) if isinstance(image, Video) else image_size(image)
        except ValueError:
            continue
        return True
    return False


def faulty(lines: pa.Table, kind: str) -> Iterator[Line]:
    """The lines whose fault is of that class."""
    import pyarrow.compute as pc

    yield from lines.filter(pc.equal(lines["kind"], kind)).to_pylist()
