"""A folder of patch features that outlives a run: found again by the digest of an image's pixels.

Enters: what the features hang on, in words (encoder, layers, image processor, dtype); keys with features [P, Dv].
Leaves: the same bytes. A folder belongs to one such description, which its `manifest.json` holds: another one is
refused.

Each process writes a pair of files of its own, so that ranks and runs share a folder without a lock: `.features`, the
plain bytes one image behind the other, and `.keys`, of each its key and a checksum. The key is written last. What a
killed process leaves half written has no key, or half of one, and is passed over. Nothing is written twice to a place.

P patches, Dv width of the encoder.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

KEY, CHECK = 16, 4
"""Bytes of a key, and of the checksum behind it."""
MANIFEST = "manifest.json"


class Place(NamedTuple):
    """Where the features of one image lie."""

    file: int
    """Open for reading."""
    offset: int
    check: bytes


class FeatureFolder:
    """Up to `gigabytes` of features of [P, Dv] `shape`; what comes later is not kept."""

    def __init__(
        self,
        folder: Path,
        description: dict[str, Any],
        shape: tuple[int, ...],
        dtype: torch.dtype,
        gigabytes: float,
        say: Callable[[str], None] = print,
    ) -> None:
        """Open it, or begin it.

        Raises:
            ValueError: the folder holds features of something else, or other files.
        """
        self.folder, self.shape, self.dtype, self.say = folder, shape, dtype, say
        self.size = torch.Size(shape).numel() * dtype.itemsize
        self.room = int(gigabytes * 2**30)
        self.name = claim(folder, {**description, "shape": list(shape), "dtype": str(dtype).removeprefix("torch.")})
        self.places: dict[bytes, Place] = {}
        self.files: dict[str, int] = {}
        """By the name of the keys: the features, open for reading."""
        self.read: dict[str, int] = {}
        """Of each file of keys, how many are known."""
        self.used = 0
        """Bytes of all features and keys, whoever wrote them."""
        self.mine: tuple[int, int] | None = None
        """The files that this process appends to."""
        self.written = 0
        self.ended = False
        """Nothing more is kept."""
        self.refresh()

    def refresh(self) -> None:
        """Learn what others have written meanwhile. Of a key in two files that of the newer one counts."""
        self.used = 0
        for keys in sorted(self.folder.glob(f"{self.name}-*.keys")):
            features = keys.with_suffix(".features")
            try:
                sizes = keys.stat().st_size, features.stat().st_size
            except FileNotFoundError:  # somebody empties the folder: what is open stays readable
                continue
            self.used += sum(sizes)
            known, whole = self.read.get(keys.name, 0), min(sizes[0] // (KEY + CHECK), sizes[1] // self.size)
            if whole > known:
                self.learn(keys, features, known, whole)

    def learn(self, keys: Path, features: Path, known: int, whole: int) -> None:
        """The entries from `known` up to `whole` of one pair of files."""
        if known == 0:
            self.files[keys.name] = os.open(features, os.O_RDONLY)
        with keys.open("rb") as file:
            file.seek(known * (KEY + CHECK))
            for number in range(known, whole):
                entry = file.read(KEY + CHECK)
                self.places[entry[:KEY]] = Place(self.files[keys.name], number * self.size, entry[KEY:])
        self.read[keys.name] = whole

    def load(self, key: bytes, into: Tensor) -> bool:
        """The features of a key into a tensor of the host [P, Dv]; False where there are none, or the disk spoiled
        them."""
        if key not in self.places:
            return False
        place, view = self.places[key], as_bytes(into)
        done = 0
        while done < self.size:
            got = os.preadv(place.file, [view[done:]], place.offset + done)
            if not got:
                break
            done += got
        if done == self.size and checksum(view) == place.check:
            return True
        del self.places[key]
        return False

    def keep(self, keys: Sequence[bytes], features: Tensor) -> None:
        """[n, P, Dv] on the host, where there is room; what is there already is not written again."""
        if self.ended or all(key in self.places for key in keys):
            return
        self.refresh()
        for key, own in zip(keys, features, strict=True):
            if key in self.places:
                continue
            if self.used + self.size + KEY + CHECK > self.room:
                self.end(f"it has reached its limit of {self.room / 2**30:g} GB")
                return
            try:
                self.append(key, as_bytes(own.contiguous()))
            except OSError as error:  # behind half an entry nothing would be found any more
                self.end(str(error))
                return

    def append(self, key: bytes, content: memoryview) -> None:
        if self.mine is None:
            self.mine = self.begin()
        check = checksum(content)
        write(self.mine[0], content)
        write(self.mine[1], memoryview(key + check))
        self.places[key] = Place(self.mine[0], self.written * self.size, check)
        self.written += 1
        self.used += self.size + KEY + CHECK

    def begin(self) -> tuple[int, int]:
        """A pair of files that no other process has."""
        stem = self.folder / f"{self.name}-{time.time_ns():020d}-{os.getpid()}"
        flags = os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_RDWR
        return os.open(f"{stem}.features", flags, 0o644), os.open(f"{stem}.keys", flags, 0o644)

    def end(self, why: str) -> None:
        self.ended = True
        self.say(f"feature cache: {self.folder} takes no more ({why}); further images are encoded each time")

    def flush(self) -> None:
        """Let what was written reach the disk, and leave the computer's memory: only the probe wants that."""
        if self.mine:
            os.fsync(self.mine[0])
            os.posix_fadvise(self.mine[0], 0, 0, os.POSIX_FADV_DONTNEED)

    def close(self) -> None:
        for file in {*self.files.values(), *(self.mine or ())}:
            os.close(file)
        self.files, self.mine, self.places = {}, None, {}


def claim(folder: Path, wanted: dict[str, Any]) -> str:
    """Make the folder that of these features, or see that it is; a name for its files.

    Raises:
        ValueError: it is another's; says in what they differ.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / MANIFEST
    if not path.exists():
        # a temporary manifest may be there: another rank is beginning the same folder
        if foreign := [other.name for other in folder.iterdir() if not other.name.startswith(MANIFEST)]:
            if not path.exists():
                raise ValueError(
                    f"train.feature_cache_dir {folder} holds {foreign[0]} and no {MANIFEST}: it is no folder of "
                    f"features. Name an empty one or one that does not exist"
                )
        else:
            temporary = folder / f"{MANIFEST}.{os.getpid()}"
            temporary.write_text(json.dumps(wanted, indent=1))
            os.replace(temporary, path)
    try:
        found = json.loads(path.read_text())
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise ValueError(f"{path} is not JSON of an object: delete the folder, or name another train.feature_cache_dir")
    if differ := [name for name in {**found, **wanted} if found.get(name) != wanted.get(name)]:
        told = "; ".join(f"{name}: {found.get(name)} there, {wanted.get(name)} here" for name in differ)
        raise ValueError(
            f"train.feature_cache_dir {folder} holds features of another kind ({told}): "
            f"name another folder for this run, or delete that one"
        )
    return hashlib.blake2b(json.dumps(wanted, sort_keys=True).encode(), digest_size=6).hexdigest()


def as_bytes(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor of the host."""
    return tensor.view(-1).view(torch.uint8).numpy().data


def checksum(content: memoryview) -> bytes:
    return zlib.crc32(content).to_bytes(CHECK, "little")


def write(file: int, content: memoryview) -> None:
    """All of it; the system may take less at a time."""
    while len(content):
        content = content[os.write(file, content) :]
