"""The lines of all shards to the columns of an index: pure, Arrow and numpy.

Enters: the tables that `measure_shard` gave, in order. Leaves: one column a count, for the good lines alone, and the
faults of the others. Nothing here makes a Python object of each line.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mllm.data.formats.source import Source
from mllm.types import Fault

Numbers = np.ndarray
SHARD_COLUMNS = {"source": pa.int16(), "shard": pa.int32(), "weight": pa.float32()}
"""What a line owes to the shard in which it stands."""


def join_tables(sources: list[Source], tables: dict[tuple[int, int], pa.Table]) -> pa.Table:
    """All lines in the order of sources, shards and rows, each with its source, shard and weight; every id once."""
    if not tables:
        raise ValueError("the data files hold no records: check the paths under data.sources")
    whole = pa.concat_tables([of_shard(sources[name[0]], *name, tables[name]) for name in sorted(tables)])
    return whole.set_column(whole.schema.get_field_index("id"), "id", told_apart(whole["id"]))


def of_shard(source: Source, number: int, shard: int, table: pa.Table) -> pa.Table:
    for name, value in (("source", number), ("shard", shard)):
        table = table.append_column(name, pa.repeat(pa.scalar(value, SHARD_COLUMNS[name]), len(table)))
    weights = pa.repeat(pa.scalar(1.0, SHARD_COLUMNS["weight"]), len(table))
    for kind, weight in source.kinds().items():
        weights = pc.if_else(pc.equal(table["variant"], kind), pa.scalar(weight, SHARD_COLUMNS["weight"]), weights)
    return table.append_column("weight", pc.coalesce(weights, pa.scalar(1.0, SHARD_COLUMNS["weight"])))


def told_apart(ids: pa.ChunkedArray) -> pa.LargeStringArray:
    """The second `a` becomes `a~1`, the third `a~2`; a name that somebody bears already is passed over."""
    names = ids.cast(pa.large_string()).combine_chunks()
    distinct = names.dictionary_encode()
    if len(distinct.dictionary) + names.null_count == len(names):
        return names
    again = np.flatnonzero(occurrence(distinct.indices.fill_null(-1).to_numpy()) * names.is_valid().to_numpy(False))
    taken = set(distinct.dictionary.filter(pc.match_substring(distinct.dictionary, "~")).to_pylist())
    last: Counter[str] = Counter()
    new = []
    for name in names.take(pa.array(again)).to_pylist():
        last[name] += 1
        while f"{name}~{last[name]}" in taken:
            last[name] += 1
        new.append(f"{name}~{last[name]}")
    mask = np.zeros(len(names), dtype=bool)
    mask[again] = True
    return pc.replace_with_mask(names, pa.array(mask), pa.array(new, pa.large_string()))


def occurrence(codes: Numbers) -> Numbers:
    """How often each value stands further left."""
    order = np.argsort(codes, kind="stable")
    ordered = codes[order]
    first = np.concatenate([[True], ordered[1:] != ordered[:-1]])
    at = np.arange(len(codes))
    earlier = np.empty(len(codes), dtype=np.int64)
    earlier[order] = at - np.maximum.accumulate(np.where(first, at, 0))
    return earlier


def groups(good: pa.Table) -> Numbers:
    """int64 [N]: kinds of one caption, which follow each other in one record, share a number."""
    kind = pc.not_equal(pc.fill_null(good["variant"], ""), "").to_numpy()
    same = kind[1:] & kind[:-1]
    for name in ("source", "shard", "row", "start"):
        column = good[name].to_numpy()
        same &= column[1:] == column[:-1]
    return np.cumsum(np.concatenate([[False], ~same]) if len(good) else [], dtype=np.int64)


def set_apart(good: pa.Table, number: int) -> Numbers:
    """bool [N]: the samples that are held out, `number` of them, with all kinds of a caption together.

    Those whose ids have the smallest hashes: it is the same samples whatever the order of files, and nearly the same
    when others are added.

    Raises:
        ValueError: nothing would be left to learn from.
    """
    group = groups(good)
    first = np.flatnonzero(np.diff(group, prepend=-1))
    ids = good["id"].take(pa.array(first)).to_pylist()
    hashes = np.array(
        [int.from_bytes(hashlib.blake2b(id.encode(), digest_size=8).digest(), "big") for id in ids], np.uint64
    )
    order = np.argsort(hashes, kind="stable")
    together = np.cumsum(np.diff(first, append=len(group))[order])  # samples of the first records, kinds counted
    if not len(together) or number >= together[-1]:
        raise ValueError(
            f"data.held_out {number} of {len(group)} samples leaves nothing to learn from: hold out fewer, or list "
            f"other files under data.held_out"
        )
    return np.isin(group, order[: int(np.searchsorted(together, number)) + 1])


def faults(sources: list[Source], bad: pa.Table) -> list[Fault]:
    """What was not used and should have been."""
    lines = bad.filter(pc.not_equal(bad["kind"], "filtered")).select(["kind", "id", "source", "shard", "row", "cause"])
    return [fault_of(sources, line) for line in lines.to_pylist()]


def fault_of(sources: list[Source], line: dict[str, Any]) -> Fault:
    where = sources[line["source"]].origin(line["shard"], line["row"]).where
    return Fault(line["kind"], line["id"] or "", where, line["cause"])


def filtered(bad: pa.Table) -> Counter[str]:
    """What a rule of its source leaves out: cause and how many."""
    counts = pc.value_counts(bad.filter(pc.equal(bad["kind"], "filtered"))["cause"])
    return Counter({str(each["values"]): each["counts"].as_py() for each in counts})


def numbers(table: pa.Table, name: str) -> Numbers:
    """A column of numbers, which nobody may write to."""
    return np.ascontiguousarray(table[name].to_numpy())
