"""From the path of a source to local files, its shards, in a fixed order.

Enters: a file, a folder, a glob, the folder of a saved data set, a URL that fsspec knows (`s3://`, `gs://`, `hf://`,
`file://`), or `hub:OWNER/NAME`, a data set of the Hugging Face Hub. Leaves: `File`s. What is far away is fetched into
the cache, what is compressed is unpacked there, so that every shard can be read at any place.
"""

from __future__ import annotations

import glob
import json
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote

from mllm.data.copies import fetched, unpacked

SUFFIXES = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet", ".arrow", ".tar", ".tgz")
PACKED = (".gz", ".bz2", ".xz")
ABOUT = {"dataset_info.json", "dataset_infos.json", "state.json", "dataset_dict.json", "quarantine.jsonl"}
"""Files that speak about a data set and hold no records."""
SPLIT = re.compile(r"(train|test|validation|valid|val|dev)(?=[-_.\d]|$)")
"""A split at the start of a file's name, as data sets on the Hub have it; or it is the name of the file's folder."""


@dataclass(frozen=True)
class File:
    """One shard."""

    path: Path
    """Where it lies on this machine."""
    name: str
    """What the user calls it: the path or URL, which errors tell."""
    stem: str
    """What the ids of its records start with: the same on every machine."""

    @property
    def folder(self) -> Path | str:
        """Where it lies for the user, which is where image paths start from."""
        return self.name.rpartition("/")[0] if is_url(self.name) else Path(self.name).parent


def find(path: Path | str, split: str = "", subset: str = "") -> list[File]:
    """The files of a source, sorted.

    Raises:
        ValueError: there are none, or it is not clear which; says what to write.
    """
    text = str(path)
    if text.startswith("hub:"):
        return from_hub(text, split, subset)
    if subset:
        raise ValueError(f"`subset` {subset!r} is for data sets of the Hub (hub:OWNER/NAME), not for {path}")
    if text.startswith("file://"):
        text = unquote(text.removeprefix("file://"))
    files = from_url(text, split) if is_url(text) else on_disk(text, split)
    if not files:
        raise ValueError(f"no data file {path}: there is no file, folder or match of that name")
    return files


def on_disk(path: str, split: str) -> list[File]:
    """The files that a local path means."""
    if os.path.isfile(path):
        names = of_split([path], split, path)
    elif os.path.isdir(path):
        names = in_folder(Path(path), split)
    else:
        names = of_split(sorted(filter(os.path.isfile, glob.glob(path, recursive=True))), split, path)
    base = path if os.path.isdir(path) else os.path.dirname(fixed(path))
    return [File(unpacked(Path(name)), name, stem_of(os.path.relpath(name, base or "."))) for name in names]


def fixed(path: str) -> str:
    """The path up to its first wildcard."""
    return re.split(r"[*?[]", path, maxsplit=1)[0]


def in_folder(folder: Path, split: str) -> list[str]:
    """The files of records in a folder, or of a data set that `datasets` saved there."""
    if (folder / "dataset_dict.json").is_file():
        splits = json.loads((folder / "dataset_dict.json").read_text())["splits"]
        return in_folder(folder / one_of(splits, split, folder), "")
    if (folder / "state.json").is_file():
        files = json.loads((folder / "state.json").read_text())["_data_files"]
        return of_split([str(folder / file["filename"]) for file in files], split, folder)
    names = []
    for place, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        names += [os.path.join(place, name) for name in files]
    return of_split(records(names, folder), split, folder)


def records(names: Iterable[str], place: Path | str) -> list[str]:
    """Those of the files that hold records, sorted; they must be of one kind."""
    kinds: dict[str, list[str]] = {}
    for name in sorted(names):
        base = os.path.basename(name)
        kind = Path(bare(base)).suffix.lower()
        if kind in SUFFIXES and base not in ABOUT and not base.startswith("."):
            kinds.setdefault(".tar" if kind == ".tgz" else kind, []).append(name)
    tars = {stem_of(name) for name in kinds.get(".tar", ())}
    for kind in [kind for kind in kinds if kind != ".tar" and tars]:  # img2dataset's tables of what it fetched
        kinds[kind] = [name for name in kinds[kind] if stem_of(name).removesuffix("_stats") not in tars]
    kinds = {kind: names for kind, names in kinds.items() if names}
    if len(kinds) > 1:
        raise ValueError(
            f"{place} holds files of several kinds ({', '.join(kinds)}): say which, as {place}/*{min(kinds)}"
        )
    return next(iter(kinds.values()), [])


def of_split(names: list[str], split: str, place: Path | str) -> list[str]:
    """The files of a split; of a place that has several one must be chosen."""
    found = {name: split_of(name) for name in names}
    splits = sorted(set(found.values()) - {""})
    if not split and len(splits) < 2:
        return names
    chosen = one_of(splits, split, place)
    return [name for name in names if found[name] == chosen]


def split_of(name: str) -> str:
    """The split that a file is of, by its name; nothing if that tells none."""
    folder, base = os.path.split(name)
    match = SPLIT.match(base) or SPLIT.fullmatch(os.path.basename(folder))
    return match[0] if match else ""


def one_of(splits: list[str], split: str, place: Path | str) -> str:
    """The split that was asked for, or the only one."""
    if split in splits or (not split and len(splits) == 1):
        return split or splits[0]
    asked = f"no split {split!r}" if split else "several splits"
    raise ValueError(f"{place} has {asked}: set `split` to one of {', '.join(splits) or '(it has none)'}")


def from_url(url: str, split: str) -> list[File]:
    """The files that a URL means, fetched into the cache."""
    import fsspec

    try:
        system, path = fsspec.core.url_to_fs(url)
        base = path.rpartition("/")[0]
        if system.isfile(path):  # first of all: over HTTP the other questions fetch the file
            names = of_split([path], split, url)
        elif glob.has_magic(path):
            base = fixed(path).rpartition("/")[0]
            names = of_split(sorted(system.glob(path)), split, url)
        else:
            base = path
            names = of_split(records(system.find(path), url), split, url)
    except (ImportError, OSError, ValueError) as error:  # a protocol that is unknown or needs a package; a refusal
        raise ValueError(f"cannot read {url}: {error or type(error).__name__}") from error
    stems = [stem_of(name.removeprefix(base).lstrip("/").partition("?")[0]) for name in names]
    files = zip(fetched(system, names), names, stems, strict=True)
    return [File(unpacked(file), system.unstrip_protocol(name), stem) for file, name, stem in files]


def from_hub(path: str, split: str, subset: str) -> list[File]:
    """A data set of the Hub (`hub:OWNER/NAME`, `@REVISION` behind it): the Arrow files that `datasets` makes of it."""
    name, _, revision = path.removeprefix("hub:").partition("@")
    try:
        import datasets

        found = datasets.load_dataset(name, subset or None, revision=revision or None)
    except Exception as error:  # whatever a network, a server and a loading script may raise
        raise ValueError(f"cannot load {path} from the Hub: {str(error)[:500] or type(error).__name__}") from error
    chosen = found[one_of(list(found), split, path)]
    files = [Path(file["filename"]) for file in chosen.cache_files]
    return [File(file, f"{path}/{file.name}", file.stem) for file in files]


def is_url(path: Path | str) -> bool:
    return "://" in str(path)


def bare(name: str) -> str:
    """The name without what compression added to it."""
    return next((name[: -len(suffix)] for suffix in PACKED if name.lower().endswith(suffix)), name)


def stem_of(name: str) -> str:
    """The name without compression and suffix."""
    return os.path.splitext(bare(name))[0]
