"""Tar archives in the manner of WebDataset: members that share a name up to its first dot are one record.

Enters: an archive, as `img2dataset` and `webdataset` write it. Leaves: a `Container` whose records lie at the byte of
their first member. A record maps what follows the dot to what is in the member (`jpg` to bytes, `txt` to words); the
keys of a `json` member stand beside these, and its `image` or `images` may name other members of the record.
"""

from __future__ import annotations

import gzip
import io
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mllm.data.containers.json_lines import parse, read_at

NAME = re.compile(r"(?:\./)?((?:.*/)?[^./][^./]*)\.([^/]+)")
"""Key and part; what has no dot, or starts with one, is no part of a record."""
IMAGES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff")
WORDS = ("txt", "text", "caption", "cls")
LARGEST = 100 * 2**20
"""Bytes of a compressed member; nobody trains on larger ones."""


class Tar:
    """Groups of members."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.file = path.open("rb")

    def scan(self) -> Iterator[tuple[int, int, Any]]:
        start, end, key = 0, 0, ""
        parts: list[tuple[str, bytes]] = []
        for offset, after, name, part, data in self.members():
            if name != key and parts:
                yield start, end - start, record(key, parts)
            if name != key or not parts:
                start, key, parts = offset, name, []
            parts.append((part, data))
            end = after
        if not parts:
            raise ValueError(f"{self.path} holds no members with names such as 000.jpg, 000.txt")
        yield start, end - start, record(key, parts)

    def fetch(self, start: int, size: int) -> Any:
        data = read_at(self.file.fileno(), start, size)
        found = plain_members(data) or all_members(data)
        if len({key for key, _, _ in found}) != 1:
            raise ValueError("the archive is another one than when it was indexed: index it again")
        return record(found[0][0], [(part, held) for _, part, held in found])

    def members(self) -> Iterator[tuple[int, int, str, str, bytes]]:
        """Yield the members of the whole archive, and make sure that it ends as an archive does."""
        try:
            with tarfile.open(self.path, "r:") as archive:
                yield from members(archive)
                end = archive.offset
        except (tarfile.TarError, OSError, EOFError) as error:
            raise ValueError(f"{self.path} is no whole tar archive ({error}): write or download it again") from error
        with self.path.open("rb") as file:
            file.seek(end)
            if len(block := file.read(tarfile.BLOCKSIZE)) < tarfile.BLOCKSIZE:
                raise ValueError(f"{self.path} has no end: its writer was stopped. Write or download it again")
            while block:
                if any(block):
                    raise ValueError(f"{self.path} is broken at byte {end}: write or download it again")
                block = file.read(2**20)


def members(archive: tarfile.TarFile) -> Iterator[tuple[int, int, str, str, bytes]]:
    """Yield (offset, offset behind it, key, part, content) of each member that is part of a record."""
    while member := archive.next():
        archive.members = []  # type: ignore[attr-defined]  # it keeps them all otherwise
        named = NAME.fullmatch(member.name)
        if named and member.isfile():
            file = archive.extractfile(member)
            assert file is not None
            yield member.offset, archive.offset, named[1], named[2].lower(), file.read()


def all_members(data: bytes) -> list[tuple[str, str, bytes]]:
    """(key, part, content) of the members in a piece of an archive."""
    try:
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as archive:
            return [found[2:] for found in members(archive)]
    except tarfile.TarError as error:
        raise ValueError(f"no record is there any more ({error}): index it again") from error


def plain_members(data: bytes) -> list[tuple[str, str, bytes]]:
    """The same where all of them are ordinary files with short names, and a fetch twice as fast; else nothing."""
    found = []
    at = 0
    while at < len(data):
        head = data[at : at + tarfile.BLOCKSIZE]
        size = head[124:136].strip(b" \0")
        if head[257:262] != b"ustar" or head[156:157] != b"0" or head[345] or not size.isdigit():
            return []
        named = NAME.fullmatch(head[:100].rstrip(b"\0").decode("utf-8", "surrogateescape"))
        start = at + tarfile.BLOCKSIZE
        at = start + int(size, 8)
        if named:
            found.append((named[1], named[2].lower(), data[start:at]))
        at += -at % tarfile.BLOCKSIZE
    return found


def record(key: str, parts: list[tuple[str, bytes]]) -> Any:
    """The parts of one record, read; or what is wrong with one of them."""
    if len(dict(parts)) < len(parts):
        return ValueError(f"{key} has two members .{next(p for i, (p, _) in enumerate(parts) if p in dict(parts[:i]))}")
    try:
        read = dict(content(part, data) for part, data in parts)
    except (ValueError, OSError, EOFError) as error:
        return ValueError(f"{key}: {error}")
    described = read.pop("json", {})
    if isinstance(described, Exception):
        return ValueError(f"{key}.json: {described}")
    described = described if isinstance(described, dict) else {"json": described}
    return {"__key__": key, **described, **read, **pictures(described, read)}


def content(part: str, data: bytes) -> tuple[str, Any]:
    """What a member is called and holds: words, JSON, or bytes."""
    if part.endswith(".gz"):
        with gzip.open(io.BytesIO(data)) as file:
            data = file.read(LARGEST)
        part = part.removesuffix(".gz")
    kind = part.rpartition(".")[2]
    if kind == "json":
        return part, parse(data)
    return part, data.decode() if kind in WORDS else data


def pictures(described: dict[str, Any], parts: dict[str, Any]) -> dict[str, Any]:
    """`image` and `images` with the members that they name; all the pictures where they name none."""
    named = {key: put_in(described[key], parts) for key in ("image", "images") if described.get(key)}
    if any(value != described[key] for key, value in named.items()):
        return named
    found = [data for part, data in parts.items() if part.rpartition(".")[2] in IMAGES]
    if not found:
        return {}
    return {"image": found[0]} if len(found) == 1 else {"images": found}


def put_in(names: Any, parts: dict[str, Any]) -> Any:
    if isinstance(names, list):
        return [put_in(name, parts) for name in names]
    return parts.get(names, names) if isinstance(names, str) else names
