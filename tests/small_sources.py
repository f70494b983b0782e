"""Small data sets of every format that shards are written from: enters a folder, leaves the path of a source."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from conftest import picture

RED = {"role": "assistant", "content": "red"}


def jpeg(seed: int, kind: str = "JPEG") -> bytes:
    file = io.BytesIO()
    picture(seed).save(file, kind)
    return file.getvalue()


def lines(path: Path, records: list[Any]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def pictures(folder: Path, number: int = 4) -> None:
    for seed in range(number):
        (folder / f"{seed}.jpg").write_bytes(jpeg(seed))


def llava(folder: Path) -> Path:
    talk = [{"from": "human", "value": "<image>\nand <image>?"}, {"from": "gpt", "value": "é \U0001f600"}]
    records = [{"id": f"r{i}", "image": [f"{i}.jpg", "0.jpg"], "conversations": talk, "type": "two"} for i in range(4)]
    text = [{"from": "system", "value": "be brief"}, {"from": "human", "value": "?"}, {"from": "gpt", "value": "no"}]
    return lines(folder / "data.jsonl", [*records, {"conversations": text}])


def messages(folder: Path) -> Path:
    parts = [{"type": "text", "text": "first"}, {"type": "image", "image": "1.jpg"}, {"type": "text", "text": "?"}]
    records = [{"messages": [{"role": "user", "content": parts}, RED], "url": "https://a.b/c"}]
    return lines(folder / "data.jsonl", records * 5)


def texts_images(folder: Path) -> Path:
    asked = [{"user": "what?", "assistant": "red"}, {"user": "and?", "assistant": "blue"}]
    rows = [{"images": [{"bytes": jpeg(i), "path": None}], "texts": asked, "source": "x"} for i in range(5)]
    pq.write_table(pa.Table.from_pylist(rows), folder / "data.parquet")
    return folder / "data.parquet"


def interleaved(folder: Path) -> Path:
    record = {"texts": ["one", None, "two", None], "images": [None, "1.jpg", None, "2.jpg"]}
    return lines(folder / "data.jsonl", [record] * 3)


def captions(folder: Path) -> Path:
    return lines(folder / "data.jsonl", [{"id": f"c{i}", "image": f"{i}.jpg", "caption": f"no {i}"} for i in range(4)])


def several_captions(folder: Path) -> Path:
    records = [{"image": f"{i}.jpg", "captions": [f"no {i}", "noise"]} for i in range(4)]
    return lines(folder / "data.jsonl", records)


def kinds(folder: Path) -> Path:
    records = [{"id": f"k{i}", "image": f"{i}.jpg", "alt": "noise", "dense": "much noise"} for i in range(4)]
    del records[2]["alt"]
    return lines(folder / "data.jsonl", records)


def odd_pictures(folder: Path) -> Path:
    for i, kind in enumerate(("PPM", "GIF", "WEBP")):
        (folder / f"{i}.jpg").write_bytes(jpeg(i, kind))
    return lines(folder / "data.jsonl", [{"image": f"{i}.jpg", "caption": f"no {i}"} for i in range(3)])


def cells(folder: Path) -> Path:
    (folder / "data.csv").write_text("name,q,a\n1,what?,red\n2,and?,blue\n")
    return folder / "data.csv"


def coco(folder: Path) -> Path:
    described = {
        "images": [{"id": i, "file_name": f"{i}.jpg"} for i in range(3)],
        "annotations": [{"id": 70 + i, "image_id": i % 3, "caption": f"no {i}"} for i in range(7)],
    }
    (folder / "data.json").write_text(json.dumps(described))
    return folder / "data.json"


KINDS = "{text: {weights: {alt: 1, dense: 2}}}"
CASES: dict[str, tuple[Callable[[Path], Path], str, str, str]] = {
    "llava": (llava, "auto", "", ""),
    "messages": (messages, "auto", "", ""),
    "texts_images of a table": (texts_images, "auto", "", ""),
    "interleaved": (interleaved, "auto", "", ""),
    "captions": (captions, "auto", "", ""),
    "several captions": (several_captions, "auto", "", ""),
    "kinds of captions": (kinds, "captions", KINDS, KINDS),
    "captions with a prompt": (captions, "captions", "{prompt: Describe it.}", ""),
    "odd kinds of pictures": (odd_pictures, "auto", "", ""),
    "fields of a table": (cells, "fields", "{image: '{name}.jpg', prompt: '{q}', answer: '{a}'}", ""),
}
"""Writer of the source, its format, its options, and those by which its shards are read."""
