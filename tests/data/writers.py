"""Writes records in every container, as the public tools that write them do."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import tarfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

Records = list[dict[str, Any]]


def png(colour: str = "red", size: tuple[int, int] = (8, 6), kind: str = "PNG") -> bytes:
    """The file of a small picture."""
    file = io.BytesIO()
    Image.new("RGB", size, colour).save(file, kind)
    return file.getvalue()


def json_list(path: Path, records: Records) -> None:
    path.write_text(json.dumps(records))


def indented_list(path: Path, records: Records) -> None:
    path.write_text(json.dumps(records, indent=2, ensure_ascii=False))


def json_lines(path: Path, records: Records) -> None:
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))


def table(path: Path, records: Records, end: str = "\n") -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(
            file, list(records[0]), delimiter="\t" if path.suffix == ".tsv" else ",", lineterminator=end
        )
        writer.writeheader()
        writer.writerows(records)


def windows_table(path: Path, records: Records) -> None:
    table(path, records, "\r\n")
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())


def parquet(path: Path, records: Records, rows: int = 3) -> None:
    pq.write_table(pa.Table.from_pylist(records), path, row_group_size=rows)


def arrow_file(path: Path, records: Records) -> None:
    rows = pa.Table.from_pylist(records)
    with pa.ipc.new_file(str(path), rows.schema) as file:
        file.write_table(rows, 2)


def arrow_stream(path: Path, records: Records) -> None:
    rows = pa.Table.from_pylist(records)
    with pa.ipc.new_stream(str(path), rows.schema) as file:
        file.write_table(rows, 2)


def tar(path: Path, records: Records) -> None:
    shard(path, [(f"{i:04d}.json", json.dumps(record).encode()) for i, record in enumerate(records)])


def packed(write: Callable[[Path, Records], None], door: Callable[..., Any]) -> Callable[[Path, Records], None]:
    """The same, compressed."""

    def write_packed(path: Path, records: Records) -> None:
        plain = path.with_name("plain" + Path(path.stem).suffix if path.suffix != ".tgz" else "plain.tar")
        write(plain, records)
        with door(path, "wb") as file:
            file.write(plain.read_bytes())
        plain.unlink()

    return write_packed


def shard(path: Path, members: Iterable[tuple[str, bytes]], form: int = tarfile.GNU_FORMAT) -> Path:
    """A tar archive of those members."""
    with tarfile.open(path, "w", format=form) as archive:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def img2dataset(path: Path, captions: list[str], kind: str = "jpg") -> Path:
    """A shard as img2dataset writes it: a picture, its caption and its metadata under a numbered key."""
    members = []
    for i, caption in enumerate(captions):
        key = f"{int(path.stem):05d}{i:04d}"
        about = {
            "caption": caption,
            "url": f"https://x.y/{key}.jpg",
            "key": key,
            "status": "success",
            "error_message": None,
            "width": 8,
            "height": 6,
            "exif": "{}",
            "sha256": "0" * 64,
        }
        picture = png(kind={"jpg": "JPEG", "png": "PNG", "webp": "WEBP"}[kind])
        members += [(f"{key}.{kind}", picture), (f"{key}.json", json.dumps(about).encode())]
        members.append((f"{key}.txt", caption.encode()))
    return shard(path, members)


CONTAINERS: dict[str, tuple[str, Callable[[Path, Records], None]]] = {
    "JSON list": ("data.json", json_list),
    "indented list": ("data.json", indented_list),
    "JSON lines": ("data.jsonl", json_lines),
    "CSV": ("data.csv", table),
    "CSV of Windows": ("data.csv", windows_table),
    "TSV": ("data.tsv", table),
    "Parquet": ("data.parquet", parquet),
    "Arrow file": ("data.arrow", arrow_file),
    "Arrow stream": ("data.arrow", arrow_stream),
    "tar": ("data.tar", tar),
    "JSON lines gz": ("data.jsonl.gz", packed(json_lines, gzip.open)),
    "JSON list xz": ("data.json.xz", packed(json_list, lzma.open)),
    "CSV bz2": ("data.csv.bz2", packed(table, bz2.open)),
    "tar gz": ("data.tar.gz", packed(tar, gzip.open)),
    "tgz": ("data.tgz", packed(tar, gzip.open)),
}
"""File name and writer of every container."""
