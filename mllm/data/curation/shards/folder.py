"""The folder that shards are written to, and what it remembers of how they were asked for.

Enters: a source, settings, the folder. Leaves: the list of the source's records, made once and kept, so that a second
run neither reads the source again nor mixes shards of other settings with those that are there.
"""

from __future__ import annotations

import fcntl
import io
import json
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import TypeAdapter

from mllm.data.curation.record_list import RecordList, list_records
from mllm.data.curation.shards.members import layout_of
from mllm.data.curation.shards.writer import Settings, Stats, write_whole
from mllm.data.formats.source import Source

FACTS, PLACES, QUARANTINE = ".to_shards.json", ".to_shards.npy", "quarantine.jsonl"
OURS = re.compile(
    r"\.?\d{5,}(\.tar|_stats\.json)(\.tmp)?|\.to_shards\.(json|npy)(\.tmp)?|quarantine\.jsonl|\.quarantine\.jsonl\.tmp"
)
LOCK_SECONDS = 5
"""Workers of a run that was killed are gone by then."""

Facts = dict[str, Any]


def facts_of(source: Source, settings: Settings) -> Facts:
    """What the shards hang on."""
    described = TypeAdapter(type(source)).dump_python(source, mode="json")
    files = [[str(file.path.resolve()), file.path.stat().st_size] for file in source.files()]
    times = [file.path.stat().st_mtime_ns for file in source.files()]
    return {**asdict(settings), "layout": layout_of(source), "source": described, "files": files, "times": times}


def check_folder(out: Path, source: Source, facts: Facts, overwrite: bool) -> bool:
    """Whether a run of the same facts has begun here.

    Raises:
        ValueError: the folder holds what is not ours, the source itself, or (unless it is to be overwritten) shards
            that were asked for in another way.
    """
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file: name a folder with --out")
    if any(out.resolve() in file.path.resolve().parents for file in source.files()):
        raise ValueError(f"{out} holds the source itself: name another folder with --out")
    there = os.listdir(out) if out.is_dir() else []
    foreign = sorted(name for name in there if not OURS.fullmatch(name))
    if foreign:
        raise ValueError(f"{out} holds other files ({', '.join(foreign)[:200]}): name a new folder with --out")
    if overwrite or not any(name == FACTS or name.endswith(".tar") for name in there):
        return False
    if FACTS not in there:
        raise ValueError(
            f"{out} holds shards but not {FACTS}, which tells how they were made: start anew with --overwrite"
        )
    told = json.loads((out / FACTS).read_text())["facts"]
    if told != facts:
        changes = ", ".join(
            f"{key} {change(told.get(key), facts[key])}" for key in facts if told.get(key) != facts[key]
        )
        raise ValueError(
            f"{out} was begun in another way: {changes}. Ask for the same as before, name another folder with --out, "
            f"or start anew with --overwrite"
        )
    return True


def change(before: Any, now: Any) -> str:
    """Two values in a few words."""
    if isinstance(before, dict) and isinstance(now, dict):
        return ", ".join(f"{key} {change(before.get(key), now[key])}" for key in now if before.get(key) != now[key])
    return "changed" if isinstance(now, list) else f"was {before}, is {now}"


@contextmanager
def held(out: Path) -> Iterator[None]:
    """The folder as long as nobody else writes into it."""
    out.mkdir(parents=True, exist_ok=True)
    handle = os.open(out, os.O_RDONLY)
    try:
        deadline = time.monotonic() + LOCK_SECONDS
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                if time.monotonic() > deadline:
                    raise ValueError(f"another run writes to {out}: wait until it is done") from error
                time.sleep(0.1)
        yield
    finally:
        os.close(handle)


def prepare(out: Path, source: Source, facts: Facts, begun: bool, workers: int) -> RecordList:
    """The source's records: as they were listed when the folder was begun, or listed now and noted down."""
    if begun:
        told = json.loads((out / FACTS).read_text())["records"]
        return RecordList(np.load(out / PLACES), **told)
    for name in os.listdir(out):
        assert OURS.fullmatch(name), f"{name} is not ours"
        (out / name).unlink()
    records = list_records(source, workers)
    file = io.BytesIO()
    np.save(file, records.places)
    write_whole(out / PLACES, file.getvalue())
    told = {key: getattr(records, key) for key in ("samples", "faults", "filtered")}
    write_whole(out / FACTS, json.dumps({"facts": facts, "records": told}, indent=1).encode())
    return records


def write_quarantine(out: Path, records: RecordList, stats: list[Stats]) -> list[Facts]:
    """Name every record that is in no shard."""
    faults = [*records.faults, *(fault for shard in stats for fault in shard["faults"])]
    if faults:
        write_whole(out / QUARANTINE, "".join(json.dumps(fault) + "\n" for fault in faults).encode())
    return faults
