"""The plan of a stream: rows of samples that nobody has counted, packed as they come, resumed exactly.

Enters: feeds, each of which is read on from any spot and gives one `Item` after the other. Leaves: the rows of one
step after the other, the same on all ranks (row r of a step belongs to rank r % world size, as in a plan), and a
position: how far each feed was read and which items wait in the packer, as numbers and ids of a few KB.

What a plan can and a stream cannot: know the length of an epoch, shuffle further than its files are shuffled, jump to
a step, let ranks read only what is theirs, sort rows by cost, say beforehand which record is bad.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any, NamedTuple, NoReturn, Protocol

from mllm.data.indexing.tally import Tally
from mllm.data.packing import BUFFER, HORIZON, Packer
from mllm.types import Sample

VERSION = 1
"""Of the way from items to rows; part of the fingerprint."""


class Spot(NamedTuple):
    """Where an item lies in its feed: spots are compared, and an item that comes later has the greater one."""

    turn: int
    """Pass over the feed."""
    source: int = -1
    shard: int = -1
    row: int = -1
    part: int = -1
    start: int = 0
    size: int = 0


@dataclass(frozen=True)
class Item:
    """One sample of a stream: what the packer must know, and what an example is made of."""

    id: str
    length: int
    """Tokens."""
    spot: Spot
    sample: Sample | None = None
    tokens: tuple[list[int], list[int]] = ([], [])
    """`input_ids` and `labels`."""
    number: int = -1
    """How many items arrived before it, of all feeds."""
    images: int = field(default=0, compare=False)
    """Of the sample's, those that stand in the tokens, where it was measured."""
    tiles: int = field(default=0, compare=False)
    """What the encoder is handed for them."""


class Feed(Protocol):
    """What items come from."""

    def read(self, after: Spot | None) -> Iterator[Item]:
        """The items behind a spot, or all, in an order that is the same each time."""
        ...

    def fetch(self, spot: Spot) -> Item:
        """The item that `read` gave there.

        Raises:
            ValueError: it is not there any more.
        """
        ...


@dataclass(frozen=True)
class Step:
    """What is remembered of a step until it is trained."""

    rows: list[list[int]]
    counts: dict[str, float]
    state: dict[str, Any]
    """Of the stream behind this step."""


class StreamPlan:
    """Rows of items, step by step, forwards only. Feeds are mixed in proportion to their weights, by counting."""

    def __init__(
        self,
        feeds: Sequence[Feed],
        seq_length: int,
        rows_per_step: int = 1,
        weights: Sequence[float] | None = None,
        packing: bool = True,
        tally: Tally | None = None,
    ) -> None:
        self.feeds, self.weights = list(feeds), list(weights or [1.0] * len(feeds))
        if len(self.weights) != len(self.feeds) or min(self.weights, default=0) <= 0:
            raise ValueError(f"weights {self.weights} for {len(self.feeds)} streams: give one above 0 for each")
        self.seq_length, self.rows_per_step, self.packing = seq_length, rows_per_step, packing
        self.tally = tally or Tally(streamed=True)
        self.packer = Packer(seq_length, BUFFER if packing else 0)  # with an empty buffer each row is one item
        self.taken = [0] * len(self.feeds)
        self.last: list[Spot | None] = [None] * len(self.feeds)
        self.waiting: dict[int, tuple[int, Item]] = {}  # arrival -> feed, item
        self.readers: dict[int, Iterator[Item]] | None = None
        self.next_step = 0
        self.made: dict[int, Step] = {}

    def items(self, step: int) -> list[list[Item]]:
        """The rows of the next step."""
        assert step == self.next_step, f"a stream goes forwards: step {self.next_step} comes next, not {step}"
        rows = list(islice(self, self.rows_per_step))
        tokens = [sum(item.length for item in row) for row in rows]
        space = len(rows) * (self.seq_length if self.packing else max(tokens))
        counts = {"samples": sum(map(len, rows)), "tokens": sum(tokens), "fill": round(sum(tokens) / space, 4)}
        self.made[step] = Step([[item.number for item in row] for row in rows], counts, self.state())
        self.next_step += 1
        return rows

    def rows(self, step: int) -> list[list[int]]:
        """The numbers of a step's items, once they were read."""
        return self.made[step].rows

    def counts(self, step: int) -> dict[str, float]:
        """Samples and real tokens of one step over all ranks, and the share of the row space they fill. The steps
        before it are trained, and forgotten."""
        self.made = {made: told for made, told in self.made.items() if made >= step}
        return self.made[step].counts

    def steps(self, epochs: float) -> NoReturn:
        """Nobody knows.

        Raises:
            ValueError: always; says what to set.
        """
        raise ValueError("data.stream reads without counting, so an epoch's steps are not known: set train.steps")

    def fingerprint(self) -> str:
        """Equal for plans that lay out the same items in the same rows."""
        facts = (VERSION, self.weights, self.seq_length, self.rows_per_step, self.packing, BUFFER, HORIZON)
        return hashlib.sha256(repr(facts).encode()).hexdigest()[:16]

    def position(self, step: int) -> dict[str, Any]:
        """What `at` needs to go on with that step, which is the one behind the last trained: JSON values, a few KB.

        However far was read ahead meanwhile: what was counted then is counted again. Only holes are those of now."""
        return {"step": step, "holes": dict(self.tally.holes), **self.made[step - 1].state}

    def at(self, position: dict[str, Any]) -> StreamPlan:
        """This plan, going on from a position. The items that waited there are fetched again.

        Raises:
            ValueError: the sources do not hold what the position says, so the rows could not be the same.
        """
        if len(position["taken"]) != len(self.feeds):
            raise ValueError(f"the checkpoint is of {len(position['taken'])} streams, these are {len(self.feeds)}")
        self.next_step, self.tally.holes = position["step"], Counter(position["holes"])
        self.tally.restore(position["tally"])
        self.taken = list(position["taken"])
        self.last = [spot and Spot(*spot) for spot in position["last"]]
        self.readers = None
        self.waiting = {
            arrival: (feed, replace(self._found(feed, Spot(*spot), length, name), number=arrival))
            for arrival, feed, length, name, spot in position["waiting"]
        }
        self.packer.arrived, self.packer.positions = position["arrived"], list(self.waiting)
        self.packer.lengths = [item.length for _, item in self.waiting.values()]
        return self

    def _found(self, feed: int, spot: Spot, length: int, name: str) -> Item:
        """An item that waited, read again and compared with what the position says of it."""
        item = self.feeds[feed].fetch(spot)
        if (item.id, item.length) != (name, length):
            raise ValueError(
                f"stream {feed} holds {item.id!r} of {item.length} tokens at {tuple(spot)}, where the checkpoint saw "
                f"{name!r} of {length}: restore the source or the tokenizer, or start anew"
            )
        return item

    def state(self) -> dict[str, Any]:
        """JSON values that say where the stream stands: about 100 bytes an item that waits, of which there are up to
        64."""
        waiting = [
            [arrival, feed, item.length, item.id, list(item.spot)] for arrival, (feed, item) in self.waiting.items()
        ]
        last = [spot and list(spot) for spot in self.last]
        told = {"arrived": self.packer.arrived, "taken": list(self.taken), "last": last, "waiting": waiting}
        return {**told, "tally": self.tally.state()}

    def __iter__(self) -> Iterator[list[Item]]:
        """Rows until every feed has ended. After each the state is that of the rows given so far."""
        while True:
            while self.packer.hungry and self._take():
                pass
            if not self.packer.positions:
                return
            row = [self.waiting.pop(arrival)[1] for arrival in self.packer.row()]
            self.tally.waiting = len(self.waiting)
            yield row

    def _take(self) -> bool:
        """Let the item come in whose feed is furthest behind its share; false when all feeds have ended."""
        if self.readers is None:
            self.readers = {number: feed.read(self.last[number]) for number, feed in enumerate(self.feeds)}
        while self.readers:
            feed = min(self.readers, key=lambda f: ((self.taken[f] + 0.5) / self.weights[f], f))
            item = next(self.readers[feed], None)
            if item is None:
                del self.readers[feed]
                continue
            arrival = self.packer.arrived
            try:
                self.packer.add(item.length)
            except ValueError as error:
                raise ValueError(f"{item.id}: {error}") from error
            self.waiting[arrival] = feed, replace(item, number=arrival)
            self.taken[feed] += 1
            self.last[feed] = item.spot
            return True
        return False
