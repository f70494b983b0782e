"""Sources to the items of a stream: read in order, measured as they come, again and again.

Enters: sources, a processor. Leaves: a `Stream`, which stands where an index would, and its feeds. Each record is
counted when it is read; a bad one is told at once, and too many of them end the run.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import count, groupby
from typing import NoReturn

import numpy as np
from pydantic import TypeAdapter

from mllm.data.formats.source import Filtered, Place, Source
from mllm.data.index import Index
from mllm.data.indexing import fingerprint
from mllm.data.indexing.tally import IN_A_ROW, Tally
from mllm.data.planning.order import key_of
from mllm.data.processor import Processor
from mllm.data.streams.plan import Feed, Item, Spot
from mllm.types import Fault, Sample

SHOWN = 5
"""Faults told in an error."""
Found = tuple[Place, "Sample | ValueError"]


def mute(faults: Iterable[Fault]) -> None:
    """Tell nobody."""


@dataclass(eq=False)
class Stream:
    """In the place of an index: it knows nothing beforehand, and counts as it reads."""

    sources: list[Source]
    processor: Processor
    max_length: int
    max_bad_share: float
    weights: list[float] | None = None
    """Of the sources, each of which is then read for itself; None reads one after the other."""
    seed: int = 0
    """Of the draw among the kinds of a record."""
    tell: Callable[[Iterable[Fault]], None] = mute
    """Is given each fault when it is met."""
    tally: Tally = field(default_factory=lambda: Tally(streamed=True))
    last: list[Fault] = field(default_factory=list)
    """The last faults."""
    faults: tuple[Fault, ...] = ()
    """None is known beforehand."""
    held_out: Index | None = None
    """Samples that are asked and never learned from; they are counted, unlike these."""

    def feeds(self) -> tuple[list[Feed], list[float]]:
        """What is mixed, and the weights."""
        if self.weights is None:
            return [SourceFeed(self, list(range(len(self.sources))))], [1.0]
        used = [number for number, weight in enumerate(self.weights) if weight > 0]
        return [SourceFeed(self, [number]) for number in used], [self.weights[number] for number in used]

    def check(self, max_bad_share: float) -> None:
        """Beforehand there is nothing to check."""

    def fingerprint(self) -> str:
        """Equal for streams of equally large files of these names under the same settings, wherever they lie."""
        sources = [[settings(source), files(source)] for source in self.sources]
        facts = [sources, self.max_length, self.seed, self.weights, fingerprint.of_processor(self.processor)]
        return fingerprint.of_text(json.dumps(facts, default=str, sort_keys=True))

    def note(self, fault: Fault) -> None:
        """Count and tell one record that gives no item.

        Raises:
            ValueError: there are too many of them, in all or one after the other.
        """
        tally = self.tally
        tally.skipped[fault.kind] += 1
        tally.in_a_row += 1
        self.tell([fault])
        self.last = [*self.last, fault][-SHOWN:]
        if tally.in_a_row >= IN_A_ROW:
            self.stop(f"{IN_A_ROW} records one after the other cannot be used")
        if tally.too_bad(self.max_bad_share):
            self.stop(f"{tally.bad_share:.2%} of the {tally.read:,} records read so far cannot be used")

    def stop(self, what: str) -> NoReturn:
        shown = "".join(f"\n  {fault}" for fault in self.last)
        raise ValueError(
            f"{what} (data.max_bad_share allows {self.max_bad_share:.1%}); the last ones:{shown or ' none'}\n"
            f"Mend or remove them, or raise data.max_bad_share"
        )


def settings(source: Source) -> dict[str, object]:
    """What a source is told beside where its files lie."""
    told = TypeAdapter(type(source)).dump_python(source)
    return {name: value for name, value in told.items() if name not in ("path", "image_dir")}


def files(source: Source) -> list[tuple[str, int]]:
    """Name and size of each shard."""
    return [(file.stem, file.path.stat().st_size) for file in source.files()]


@dataclass(frozen=True, eq=False)
class SourceFeed:
    """Some sources of a stream, one after the other, again and again."""

    stream: Stream
    numbers: list[int]

    def read(self, after: Spot | None) -> Iterator[Item]:
        """Items without end. What lies before `after` in its shard is read over, and neither measured nor counted.

        Raises:
            ValueError: too many records are bad, or a whole pass gives no item.
        """
        for turn in count(after.turn if after else 0):
            empty = after is None or turn > after.turn
            for item in self.turn(turn, after or Spot(0)):
                empty = False
                yield item
            if empty:
                names = ", ".join(str(self.stream.sources[number].path) for number in self.numbers)
                self.stream.stop(f"a whole pass over {names} gives no sample, {self.stream.tally.read:,} records read")

    def turn(self, turn: int, after: Spot) -> Iterator[Item]:
        """The items of one pass."""
        for number in self.numbers:
            source = self.stream.sources[number]
            for shard in range(len(source.files())):
                if (turn, number, shard) < after[:3]:
                    continue
                for row, record in groupby(source.scan(shard), key=lambda found: found[0].row):
                    place = Spot(turn, number, shard, row)
                    yield from self.record(place, drawn(list(record), source, (self.stream.seed, *place)), after)

    def record(self, place: Spot, record: list[Found], after: Spot) -> Iterator[Item]:
        """The items of one record that lie behind `after`."""
        for at, found in record:
            spot = place._replace(part=at.part, start=at.start, size=at.size)
            if spot > after:
                item = self.met(spot, found)
                if isinstance(item, Item):
                    yield item
                elif item:
                    self.stream.note(item)

    def met(self, spot: Spot, found: Sample | ValueError) -> Item | Fault | None:
        """Count what was read, and measure it; nothing comes of what is left out on purpose."""
        tally, where = self.stream.tally, self.where(spot)
        tally.read += 1
        if isinstance(found, Filtered):
            tally.filter(str(found).removeprefix(f"{where}: "))
            return None
        if isinstance(found, ValueError):
            return Fault("record", "", where, str(found).removeprefix(f"{where}: "))
        try:
            kept = self.stream.processor.encoded(found, self.stream.max_length)
        except ValueError as error:
            return Fault(getattr(error, "kind", "text"), found.id, where, str(error).removeprefix(f"{where}: "))
        tally.in_a_row = 0
        tally.truncated, tally.tokens_cut = tally.truncated + bool(kept.cut), tally.tokens_cut + kept.cut
        tokens = kept.input_ids, kept.labels
        return Item(found.id, len(kept.input_ids), spot, found, tokens, images=kept.images, tiles=kept.tiles)

    def fetch(self, spot: Spot) -> Item:
        """The item that was read there; it is not counted again.

        Raises:
            ValueError: it cannot be read any more.
        """
        sample = self.stream.sources[spot.source].fetch(Place(spot.shard, spot.start, spot.size, spot.row, spot.part))
        tokens = self.stream.processor.encode(sample, self.stream.max_length)
        return Item(sample.id, len(tokens[0]), spot, sample, tokens)

    def where(self, spot: Spot) -> str:
        return self.stream.sources[spot.source].origin(spot.shard, spot.row).where


def drawn(record: list[Found], source: Source, key: tuple[int, ...]) -> list[Found]:
    """What is used of one record: of its kinds of text the one that the key draws, and all else."""
    kinds = {at: found.variant for at, found in record if isinstance(found, Sample) and found.variant}
    if not kinds:
        return record
    reach = np.cumsum([source.kinds().get(kind, 1.0) for kind in kinds.values()])
    if not reach[-1]:
        return [(next(iter(kinds)), ValueError("only kinds of text whose weight is 0: give one of them a weight"))]
    toss = (key_of(*key) >> 11) * 2.0**-53  # [0, 1)
    chosen = list(kinds)[int(np.searchsorted(reach, toss * reach[-1], side="right"))]
    return [(at, found) for at, found in record if at == chosen or at not in kinds]
