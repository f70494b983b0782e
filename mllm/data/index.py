"""What is known of all samples before anything is trained: how long each is, where it lies, and which cannot be used.

Enters: sources and a processor. Leaves: an `Index`, columns of numbers that fit in memory for millions of samples: no
sample, no token, no pixel is kept. What is wrong with the data is known here, all of it, before the first step.
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mllm.data.formats.source import Place, Source
from mllm.data.indexing import columns, store
from mllm.data.indexing.jobs import cut_jobs, run_jobs, shard_bytes
from mllm.data.indexing.measure import join_parts, mended
from mllm.data.indexing.tally import Tally
from mllm.data.processor import Processor
from mllm.types import Fault, Sample

SHOWN = 5
"""Faults told in an error; the quarantine file names them all."""

Numbers = np.ndarray
COPIED = ("length", "supervised", "tiles", "source", "weight", "shard", "start", "size", "row", "part")
Tables = dict[tuple[int, int], pa.Table]
"""(source, shard) -> its lines, as `measure.SCHEMA` has them."""


@dataclass(eq=False)
class Index:
    """A column for each count; number n of every column is the sample number n of the plan."""

    sources: list[Source]
    max_length: int
    ids: pa.LargeStringArray
    """No two are equal: the second `a` became `a~1`, since the state of a sample hangs on its id."""
    length: Numbers
    """int32: tokens, visual tokens included."""
    supervised: Numbers
    """int32: tokens that carry a loss."""
    images: Numbers
    """int32: images."""
    tiles: Numbers
    """int32: what the encoder is handed for them; as many, unless images are cut into tiles."""
    source: Numbers
    """int16: number of the source."""
    group: Numbers
    """int64: neighbours with one number are kinds of one record, of which an epoch uses one."""
    weight: Numbers
    """float32: of the kind among its group."""
    shard: Numbers
    start: Numbers
    size: Numbers
    row: Numbers
    part: Numbers
    sizes: pa.ListArray
    """Width and height of each image in turn."""
    truncated: Numbers
    """int64: numbers of the samples that are cut to `max_length`."""
    tokens_cut: int
    """Tokens that cutting took away."""
    faults: list[Fault]
    """What was not used and should have been."""
    filtered: Counter[str]
    """What a rule of its source leaves out: cause and how many; and what is held out of the same sources."""
    held_out: Index | None = None
    """Samples that are asked and never learned from."""

    def __len__(self) -> int:
        return len(self.length)

    @property
    def num_images(self) -> int:
        return int(self.images.sum())

    @property
    def read(self) -> int:
        """Samples and bad records that the sources hold."""
        return len(self) + len(self.faults) + self.filtered.total()

    @property
    def bad_share(self) -> float:
        """Share of the samples that cannot be used, of those that should be."""
        return len(self.faults) / max(1, len(self.faults) + len(self))

    @property
    def tally(self) -> Tally:
        """What became of all that was read, before any of it is used."""
        skipped = Counter(fault.kind for fault in self.faults) + Counter(filtered=self.filtered.total())
        return Tally(
            read=self.read,
            skipped=+skipped,
            filtered=self.filtered.copy(),
            truncated=len(self.truncated),
            tokens_cut=self.tokens_cut,
        )

    def id(self, number: int) -> str:
        return str(self.ids[number])

    def place(self, number: int) -> Place:
        numbers = (self.shard, self.start, self.size, self.row, self.part)
        return Place(*(int(column[number]) for column in numbers))

    def where(self, number: int) -> str:
        """File and row, told without reading anything."""
        return self.sources[self.source[number]].origin(int(self.shard[number]), int(self.row[number])).where

    def sample(self, number: int) -> Sample:
        """The sample, read from its place.

        Raises:
            ValueError: it cannot be read, or another one lies there by now.
        """
        sample = self.sources[self.source[number]].fetch(self.place(number))
        name = self.id(number)
        if name != sample.id and not name.startswith(f"{sample.id}~"):
            raise ValueError(
                f"{sample.where}: holds {sample.id!r}, held {name!r} when it was indexed: the file changed"
            )
        return replace(sample, id=name)

    def fingerprint(self) -> str:
        """Equal for indices of the same samples in the same order, wherever their files lie."""
        digest = hashlib.sha256()
        for column in self.ids.cast(pa.large_binary()).buffers()[1:]:
            digest.update(column or b"")
        for numbers in (self.length, self.images, self.source):
            digest.update(np.ascontiguousarray(numbers).data)
        return digest.hexdigest()[:16]

    def check(self, max_bad_share: float) -> None:
        """Stop if there are too many faults or nothing is left.

        Raises:
            ValueError: tells the first faults and the remedy.
        """
        if len(self) and self.bad_share <= max_bad_share:
            return
        if not self.faults and self.filtered:
            causes = ", ".join(f"{number:,} x {cause}" for cause, number in self.filtered.most_common(SHOWN))
            raise ValueError(f"nothing is left to learn from: the filters leave out every sample ({causes})")
        if not self.faults:
            raise ValueError("the data files hold no records: check the paths under data.sources")
        shown = "\n  ".join(map(str, self.faults[:SHOWN]))
        more = f"\n  ... and {len(self.faults) - SHOWN} more" if len(self.faults) > SHOWN else ""
        raise ValueError(
            f"{len(self.faults)} of {len(self.faults) + len(self)} records cannot be used "
            f"(data.max_bad_share allows {max_bad_share:.1%}):\n  {shown}{more}\n"
            f"Mend or remove them (data_scripts/check.py PATH --json FILE names each), or raise data.max_bad_share: "
            f"then they are left out, and named in quarantine.jsonl"
        )


def build_index(
    sources: Iterable[Source],
    processor: Processor,
    max_length: int,
    workers: int = 0,
    folder: Path | None = None,
    progress: bool = True,
    held_out: int = 0,
) -> Index:
    """Measure every shard of every source once, in `workers` processes; those that `folder` knows are read back. That
    many samples of them are held out.

    The index is the same for any number of workers, and whether a shard was measured or read back.

    Raises:
        ValueError: a file as a whole is broken; nothing would be left to learn from.
    """
    sources = list(sources)
    shards = [source.shards() for source in sources]
    tables, facts = stored_tables(sources, shards, processor, max_length, folder)
    missing = [
        (number, shard, shard_bytes(path))
        for number, paths in enumerate(shards)
        for shard, path in enumerate(paths)
        if (number, shard) not in tables
    ]
    parts: dict[tuple[int, int], dict[int, pa.Table]] = defaultdict(dict)
    jobs = cut_jobs(missing, workers)
    for job, table in run_jobs(jobs, sources, processor, max_length, workers, progress):
        name = job.source, job.shard
        parts[name][job.part] = table
        if len(parts[name]) == job.parts:
            tables[name] = join_parts([table for _, table in sorted(parts.pop(name).items())])
            if folder:
                store.store(folder, facts[name], tables[name])
    return assemble(sources, tables, max_length, held_out)


def stored_tables(
    sources: Sequence[Source], shards: list[list[Path]], processor: Processor, max_length: int, folder: Path | None
) -> tuple[Tables, dict[tuple[int, int], store.Facts]]:
    """The tables that can be read back, and the facts of every shard."""
    tables: Tables = {}
    facts: dict[tuple[int, int], store.Facts] = {}
    if folder is None:
        return tables, facts
    run = store.facts_of_run(processor, max_length)
    for number, source in enumerate(sources):
        for shard, path in enumerate(shards[number]):
            facts[number, shard] = store.facts_of_shard(run, source, path)
            table = store.load(folder, facts[number, shard])
            if table is not None and not mended(source, table, shard):
                tables[number, shard] = table
    return tables, facts


def assemble(sources: list[Source], tables: Tables, max_length: int, held_out: int = 0) -> Index:
    """The index of all lines, in the order of sources, shards and rows, and that of those which are held out."""
    lines = columns.join_tables(sources, tables)
    good, bad = lines.filter(pc.is_null(lines["kind"])), lines.filter(pc.is_valid(lines["kind"]))
    faults, filtered = columns.faults(sources, bad), columns.filtered(bad)
    if not held_out:
        return of_lines(sources, good, max_length, faults, filtered)
    apart = columns.set_apart(good, held_out)
    filtered["held out"] = int(apart.sum())
    index = of_lines(sources, good.filter(pa.array(~apart)), max_length, faults, filtered)
    index.held_out = of_lines(sources, good.filter(pa.array(apart)), max_length, [], Counter())
    return index


def of_lines(
    sources: list[Source], good: pa.Table, max_length: int, faults: list[Fault], filtered: Counter[str]
) -> Index:
    """The index of lines that can be used."""
    cut = columns.numbers(good, "cut")
    sizes = good["sizes"].combine_chunks()
    return Index(
        sources=sources,
        max_length=max_length,
        ids=good["id"].combine_chunks(),
        images=np.diff(sizes.offsets.to_numpy()) // 2,
        group=columns.groups(good),
        sizes=sizes,
        truncated=np.flatnonzero(cut),
        tokens_cut=int(cut.sum()),
        faults=faults,
        filtered=filtered,
        held_out=None,
        **{name: columns.numbers(good, name) for name in COPIED},
    )
