"""Where the tables of an index are kept: one Parquet file a shard, read back as long as nothing it hangs on changed.

Enters: a shard, the facts that its counts depend on (`Facts`), a folder. Leaves: the table, or None where it must be
measured anew. The facts stand in the file itself and are compared whole, so that a stale file is never believed; a
file is written beside its place and renamed into it, so that one of that name is whole.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from mllm.data.copies import cache_folder
from mllm.data.formats.source import Source
from mllm.data.indexing import fingerprint
from mllm.data.indexing.measure import SCHEMA
from mllm.data.processor import Processor

Facts = dict[str, Any]
KEY = b"mllm.index"


def default_folder() -> Path:
    """One place for all runs that read the same files."""
    return cache_folder() / "index"


def facts_of_run(processor: Processor, max_length: int) -> Facts:
    """What the counts of every shard depend on."""
    return {"code": fingerprint.of_code(), "max_length": max_length, **fingerprint.of_processor(processor)}


def facts_of_shard(run: Facts, source: Source, shard: Path) -> Facts:
    """What the counts of one shard depend on: the run's facts, the source's settings, the file as it lies there."""
    state = shard.stat()
    file = {"shard": str(shard.resolve()), "bytes": state.st_size, "mtime_ns": state.st_mtime_ns}
    return {**run, "source": fingerprint.of_source(source), **file}


def place_of(folder: Path, facts: Facts) -> Path:
    """The file of a shard: another one for another tokenizer, the same one for another state of the shard."""
    lasting = {name: value for name, value in facts.items() if name not in ("bytes", "mtime_ns", "code")}
    name = fingerprint.of_text(json.dumps(lasting, sort_keys=True))
    return folder / f"{Path(facts['shard']).stem[:60]}-{name}.parquet"


def load(folder: Path, facts: Facts) -> pa.Table | None:
    """The table that was stored under the same facts; None where there is none, or it cannot be read."""
    path = place_of(folder, facts)
    if not path.is_file():
        return None
    try:
        table = pq.read_table(path, partitioning=None)
    except (pa.ArrowException, OSError):
        return None
    if (table.schema.metadata or {}).get(KEY) != encoded(facts) or not table.schema.equals(SCHEMA):
        return None
    return table.replace_schema_metadata(None)


def store(folder: Path, facts: Facts, table: pa.Table) -> None:
    """Write a table under its facts.

    Raises:
        ValueError: the folder cannot be written; names it and the setting.
    """
    path = place_of(folder, facts)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as beside:
            unfinished = Path(beside) / path.name
            pq.write_table(table.replace_schema_metadata({KEY: encoded(facts)}), unfinished)
            unfinished.replace(path)
    except OSError as error:
        raise ValueError(
            f"the index cannot be written to {folder} ({error}): name a folder with data.index_dir or $MLLM_CACHE"
        ) from error


def encoded(facts: Facts) -> bytes:
    return json.dumps(facts, sort_keys=True).encode()
