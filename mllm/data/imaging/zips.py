"""One file out of a zip, at random and without unpacking.

Enters: `ARCHIVE.zip::MEMBER`. Leaves: the member's bytes, checked against the archive's own checksum. LLaVA's images
come as one zip of 558,000 files, which many file systems would rather not see unpacked.

The list of members is read once a process and inherited by forked workers. It is kept as arrays: half a million names
would be 300 MB, and counting their references would copy them into each worker. Bytes are read at their place without
moving a file position, so that processes and threads may share one handle.
"""

from __future__ import annotations

import functools
import os
import zipfile
import zlib
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np

OPEN = 64
"""Archives kept open at a time."""
LOCAL_HEADER = 30
"""Bytes in front of a member before its name; the lengths of name and extra field stand at 26 and 28."""


@dataclass(frozen=True)
class Archive:
    """An open zip and where its members lie."""

    file: BinaryIO
    keys: np.ndarray
    """[members] int64, ascending: the names' hashes in this process (two of a million are equal once in 10^7 zips)."""
    places: np.ndarray
    """[members, 6] int64: start, bytes stored, bytes unpacked, method, checksum, flags."""

    def find(self, name: str) -> list[int]:
        """The place of a member; of several of one name the last, as unzipping would leave it."""
        row = int(np.searchsorted(self.keys, hash(name), side="right")) - 1
        if row < 0 or self.keys[row] != hash(name):
            raise ValueError(f"no {name!r} among the {len(self.keys)} files of {self.file.name}")
        return [int(number) for number in self.places[row]]


def is_zipped(name: str) -> bool:
    return ".zip::" in name


def read_member(name: str, most: int) -> bytes:
    """The bytes behind `ARCHIVE.zip::MEMBER`, not more than `most`; `ARCHIVE.zip::` may stand where a folder does.

    Raises:
        ValueError: there is no such archive or member, it is too large, packed in an unusual way, or damaged.
    """
    stem, _, member = name.partition(".zip::")
    archive = open_archive(f"{stem}.zip")
    start, stored, size, method, checksum, flags = archive.find(member.lstrip("/"))
    if max(stored, size) > most:
        raise ValueError(f"{size} bytes, more than {most}")
    if flags & 1 or method not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ValueError("encrypted or packed in another way than deflate: pack the archive again")
    data = read_at(archive.file.fileno(), start, stored)
    if method == zipfile.ZIP_DEFLATED:
        data = inflate(data, size)
    if len(data) != size or zlib.crc32(data) != checksum:
        raise ValueError(f"damaged in its archive: {len(data)} of {size} bytes, or another checksum")
    return data


def inflate(data: bytes, size: int) -> bytes:
    """As many bytes as are promised, and one more if there are more."""
    try:
        return zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, size + 1)
    except zlib.error as error:
        raise ValueError(f"damaged in its archive: {error}") from error


def read_at(handle: int, start: int, stored: int) -> bytes:
    """The member's bytes as they are stored, behind its own header."""
    header = os.pread(handle, LOCAL_HEADER, start)
    gap = int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
    return os.pread(handle, stored, start + LOCAL_HEADER + gap)


def open_archive(path: str) -> Archive:
    """The archive, kept from the last time unless it is another file by now."""
    if not os.path.isfile(path):
        raise ValueError(f"no such archive: {path}")
    facts = os.stat(path)
    return read_archive(path, facts.st_ino, facts.st_mtime_ns, facts.st_size)


@functools.lru_cache(maxsize=OPEN)
def read_archive(path: str, *_identity: int) -> Archive:
    file = open(path, "rb")  # noqa: SIM115 (stays open as long as the cache holds it)
    with zipfile.ZipFile(file) as directory:
        keys = np.array([hash(entry.filename) for entry in directory.infolist()], np.int64)
        places = np.array([place(entry) for entry in directory.infolist()], np.int64).reshape(-1, 6)
    ascending = np.argsort(keys, kind="stable")
    return Archive(file, keys[ascending], places[ascending])


def place(entry: zipfile.ZipInfo) -> tuple[int, ...]:
    size = entry.compress_size, entry.file_size
    return entry.header_offset, *size, entry.compress_type, entry.CRC, entry.flag_bits
