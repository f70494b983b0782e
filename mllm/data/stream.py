"""Streams: rows from sources that cannot be indexed, packed as they come, resumed exactly.

Enters: sources that are read from some place on, one `Item` after the other. Leaves: rows of items, in one order for
all ranks (row r of a step belongs to rank r % world size, as in a plan), and a state: how far each source was read and
which items wait in the packer, as numbers and ids of a few KB.

What a plan can and a stream cannot: know its number of steps, shuffle further than its sources do, jump to a step, let
ranks and workers read only what is theirs (each reads every source, and may put off decoding until it knows its rows),
sort rows by cost, say beforehand which record is bad. Where an index can be made, make one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from mllm.data.packing import BUFFER, Packer


@dataclass(frozen=True)
class Item:
    """One sample of a stream: what the packer must know, and what the loader makes a row of."""

    id: str
    length: int
    """Tokens."""
    sample: Any = None


Open = Callable[[int], Iterator[Item]]
"""Reads a source from its n-th item on, in an order that is the same each time."""


class StreamPlan:
    """Iterate for rows, each a list of items. Sources are mixed in proportion to their weights, by counting."""

    def __init__(
        self, sources: Sequence[Open], seq_length: int, weights: Sequence[float] | None = None, buffer: int = BUFFER
    ) -> None:
        self.sources, self.weights = list(sources), list(weights or [1.0] * len(sources))
        if len(self.weights) != len(self.sources) or min(self.weights, default=0) <= 0:
            raise ValueError(f"weights {self.weights} for {len(self.sources)} streams: give one above 0 for each")
        self.packer = Packer(seq_length, buffer)
        self.taken = [0] * len(self.sources)
        self.waiting: dict[int, tuple[int, int, Item]] = {}  # arrival -> source, place in it, item
        self.readers: dict[int, Iterator[Item]] = {}

    def __iter__(self) -> Iterator[list[Item]]:
        """Rows until every source has ended. After each the state is that of the rows given so far."""
        if not self.readers:
            self.readers = {source: read(self.taken[source]) for source, read in enumerate(self.sources)}
        while True:
            while self.packer.hungry and self._take():
                pass
            if not self.packer.positions:
                return
            yield [self.waiting.pop(arrival)[2] for arrival in self.packer.row()]

    def _take(self) -> bool:
        """Let the item come in whose source is furthest behind its share; false when all sources have ended."""
        while self.readers:
            source = min(self.readers, key=lambda s: ((self.taken[s] + 0.5) / self.weights[s], s))
            item = next(self.readers[source], None)
            if item is None:
                del self.readers[source]
                continue
            try:
                self.packer.add(item.length)
            except ValueError as error:
                raise ValueError(f"{item.id}: {error}") from error
            self.waiting[self.packer.arrived - 1] = source, self.taken[source], item
            self.taken[source] += 1
            return True
        return False

    def state(self) -> dict[str, Any]:
        """JSON values from which `at` goes on: less than 100 bytes an item that waits, of which there are up to 65."""
        waiting = [
            [arrival, source, place, item.length, item.id] for arrival, (source, place, item) in self.waiting.items()
        ]
        return {"arrived": self.packer.arrived, "taken": list(self.taken), "waiting": waiting}

    def at(self, state: dict[str, Any]) -> StreamPlan:
        """A stream like this one that goes on from a state. Each source is read again from the oldest of its items
        that wait, at most 256 items back.

        Raises:
            ValueError: the sources do not hold what the state says, so the rows could not be the same.
        """
        resumed = StreamPlan(self.sources, self.packer.seq_length, self.weights, self.packer.buffer)
        if len(state["taken"]) != len(self.sources):
            raise ValueError(f"the state is of {len(state['taken'])} streams, these are {len(self.sources)}")
        resumed.taken = list(state["taken"])
        found = {}
        for source, read in enumerate(self.sources):
            places = {place for _, of, place, _, _ in state["waiting"] if of == source}
            first = min(places, default=resumed.taken[source])
            resumed.readers[source] = reader = read(first)
            for place in range(first, resumed.taken[source]):
                item = next(reader, None)
                if place in places:
                    found[source, place] = item
        for arrival, source, place, length, name in state["waiting"]:
            item = found[source, place]
            if item is None or (item.id, item.length) != (name, length):
                shown = f"{item.id!r} of {item.length} tokens" if item else "nothing"
                raise ValueError(
                    f"stream {source} holds {shown} at place {place}, where the checkpoint saw {name!r} of "
                    f"{length}: restore the source or the tokenizer, or start anew"
                )
            resumed.waiting[arrival] = source, place, item
        packer = resumed.packer
        packer.arrived, packer.positions = state["arrived"], list(resumed.waiting)
        packer.lengths = [item.length for _, _, item in resumed.waiting.values()]
        return resumed
