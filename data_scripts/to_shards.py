"""Any data set that a recipe can read to WebDataset tars.

    python data_scripts/to_shards.py PATH --out runs/shards [--image-dir DIR] [--format NAME] [--max-side 1024]

Enters: whatever `data.sources` takes: JSON, tables, tars, folders of `datasets`, URLs. Leaves, in `--out`: tars of
KEY.jpg + KEY.txt + KEY.json (captions, in img2dataset's manner) or KEY.json + KEY.0.jpg ... (chats), which recipes and
stock `webdataset` read; the stats of each; `quarantine.jsonl` with file, row and cause of whatever is in none of them.
Why: a few large files instead of half a million small ones.

Stop it whenever you like: the same command goes on where it stood, and ends with the same bytes, whatever the number
of workers. Exit code: 0 every record is in a shard; 2 it could not be done; 3 done, but records were unreadable; 4
done, but images were; 130 stopped by Ctrl-C. (1 is Python's own: the program is at fault.)
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import tyro

from mllm.data.crew import cores
from mllm.data.curation.door import run
from mllm.data.curation.record_list import RecordList, list_records
from mllm.data.curation.shards.folder import QUARANTINE, check_folder, facts_of, held, prepare, write_quarantine
from mllm.data.curation.shards.members import layout_of
from mllm.data.curation.shards.writer import Settings, Stats, num_shards, read_stats, total, write_shards
from mllm.data.curation.source_options import in_words, source_of

UNREADABLE_RECORDS, UNREADABLE_IMAGES = 3, 4


def main(
    path: tyro.conf.Positional[str],
    out: Path,
    format: str = "auto",
    image_dir: str | None = None,
    split: str = "",
    subset: str = "",
    options: str = "",
    samples_per_shard: int = 10_000,
    max_side: int | None = None,
    decode: bool = True,
    workers: int | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
) -> int:
    """Write a data set as WebDataset tars.

    Args:
        path: File, folder, glob, URL or `hub:OWNER/NAME`, as in `data.sources`.
        out: The folder to write.
        format: Name of the format; by default the records say what they are.
        image_dir: Folder or zip archive that relative image paths start from.
        split: Which split, of a path that holds several.
        subset: Which part of a data set of the Hub that has several.
        options: The format's other options as YAML, e.g. '{text: {weights: {alt: 1, dense: 2}}}'.
        samples_per_shard: Records in a tar: an image with all its captions is one, and so is a chat.
        max_side: Shrink images whose longer side has more pixels; otherwise files are copied as they are.
        decode: Decode every image to be sure that it can be; --no-decode looks at headers alone.
        workers: Processes; as many as there are cores by default, 0 for none beside this one.
        overwrite: Start anew where the folder holds shards of other settings.
        dry_run: Count records and shards, write nothing.
    """
    for name, value in {"samples-per-shard": samples_per_shard, "max-side": max_side, "workers": workers}.items():
        if value is not None and value < (0 if name == "workers" else 1):
            raise ValueError(f"--{name} is {value}: give a positive number")
    workers = cores() if workers is None else workers
    source = source_of(path, format, image_dir, split, subset, options)
    settings = Settings(samples_per_shard, max_side, decode)
    facts = facts_of(source, settings)
    print(f"{path}: {in_words(source)}")
    begun = check_folder(out, source, facts, overwrite)
    if dry_run:
        records = list_records(source, workers)
        print(planned(records, settings))
        return exit_code(records.faults)
    with held(out):
        records = prepare(out, source, facts, begun, workers)
        print(planned(records, settings))
        before = sum(read_stats(out, number) is not None for number in range(num_shards(records, settings)))
        stats = write_shards(records, source, settings, out, workers)
        bad = write_quarantine(out, records, stats)
    print(written(stats, before))
    print(f"read them with: {{path: {out}/*.tar, format: {layout_of(source)}}}")
    if bad:
        print(f"{len(bad):,} records are in no shard: {out / QUARANTINE} says why. Mend them, then --overwrite")
    return exit_code(bad)


def exit_code(faults: list[dict[str, Any]]) -> int:
    """What became of the records, by the worst class of fault."""
    kinds = {fault["kind"] for fault in faults}
    return UNREADABLE_RECORDS if "record" in kinds else UNREADABLE_IMAGES if kinds else 0


def planned(records: RecordList, settings: Settings) -> str:
    """The counts before anything is written."""
    shards = num_shards(records, settings)
    lines = [
        f"{len(records):,} records ({records.samples:,} samples) make {shards:,} shards of up to "
        f"{settings.samples_per_shard:,}; {len(records.faults):,} records cannot be read"
    ]
    lines += [f"  {fault['file']}, row {fault['row']}: {fault['cause']}" for fault in records.faults[:3]]
    lines += [f"  {number:,} {cause}" for cause, number in records.filtered.items()]
    return "\n".join(lines)


def written(stats: list[Stats], before: int) -> str:
    """The counts at the end."""
    sums = total(stats)
    there = f" ({before:,} were there already)" if before else ""
    return (
        f"{len(stats):,} shards{there}: {sums['records']:,} records, {sums['images']:,} images, "
        f"{sums['bytes'] / 2**20:,.1f} MiB"
    )


def door(arguments: list[str] | None = None) -> int:
    """The command; a mistake is one line, not a traceback."""
    return run(main, __doc__, arguments, stopped="stopped: the same command goes on from here")


if __name__ == "__main__":
    sys.exit(door())
