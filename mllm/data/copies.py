"""Files made once from other files: fetched from far away, unpacked, or laid out for reading at any place.

Enters: a file and what names its present state. Leaves: a local file under `~/.cache/mllm` (`MLLM_CACHE` moves it).
A file appears there whole or not at all, also when several processes make it at once; of another state of the
original another file is made.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

STATE = (
    *("etag", "ETag", "md5Hash", "Content-MD5", "blob_id"),
    *("mtime", "LastModified", "last_modified", "Last-Modified", "created"),
)
"""What the file systems of fsspec call the mark that changes with the content."""
CONNECTIONS = 8


def cache_folder() -> Path:
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("MLLM_CACHE") or Path(home) / "mllm")


def made(name: str, state: Iterable[Any], make: Callable[[Path], None]) -> Path:
    """The file of that name for that state, made by `make(path)` if it is not there yet."""
    key = hashlib.sha256("\n".join(map(str, state)).encode()).hexdigest()[:16]
    target = cache_folder() / key / name
    if target.is_file():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        unfinished = Path(folder) / name
        make(unfinished)
        os.replace(unfinished, target)
    return target


def made_of(path: Path, name: str, make: Callable[[Path], None]) -> Path:
    """A file made of a local file, anew when that has changed."""
    state = path.stat()
    return made(name, (path.resolve(), state.st_size, state.st_mtime_ns), make)


def fetched(system: Any, names: list[str]) -> list[Path]:
    """Local copies of the files of an fsspec file system, several at a time."""
    with ThreadPoolExecutor(CONNECTIONS) as pool:
        return list(pool.map(lambda name: fetch(system, name), names))


def fetch(system: Any, name: str) -> Path:
    """A local copy of one file, as it is there now."""
    url = system.unstrip_protocol(name)
    try:
        info = system.info(name)
        size = info.get("size")

        def download(target: Path) -> None:
            system.get_file(name, str(target))
            if size is not None and target.stat().st_size != size:
                raise OSError(f"{target.stat().st_size} of {size} bytes came")

        state = [info.get(mark) for mark in STATE]
        return made(os.path.basename(name.partition("?")[0]), (url, size, *state), download)
    except OSError as error:
        raise ValueError(f"cannot fetch {url}: {error or type(error).__name__}") from error


def unpacked(path: Path) -> Path:
    """The file itself, or what is in it if it is compressed (`.gz`, `.tgz`, `.bz2`, `.xz`)."""
    import bz2
    import gzip
    import lzma

    doors: dict[bytes, Callable[..., Any]] = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ": lzma.open}
    with path.open("rb") as file:
        head = file.read(5)
    door = next((door for magic, door in doors.items() if head.startswith(magic)), None)
    if door is None:
        return path

    def unpack(target: Path) -> None:
        try:
            with door(path, "rb") as packed, target.open("wb") as file:
                shutil.copyfileobj(packed, file, 2**20)
        except (EOFError, OSError, lzma.LZMAError, ValueError) as error:
            raise ValueError(f"{path} cannot be unpacked ({error}): write or download it again") from error

    return made_of(path, path.stem + ".tar" if path.suffix == ".tgz" else path.stem, unpack)
