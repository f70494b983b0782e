"""Where an image's bytes lie, and how many of them we are willing to read.

Enters: whatever may name an image but a picture itself: bytes, a path, `ARCHIVE.zip::MEMBER`, `file://`, `http(s)://`
or a data URI, the mapping of `bytes` and `path` that Hugging Face's `datasets` has for an image. Leaves: a path or a
stream that Pillow may open, never more than `MAX_BYTES`.
"""

from __future__ import annotations

import base64
import io
import time
import urllib.parse
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mllm.data.imaging.zips import is_zipped, read_member

MAX_BYTES = 100 * 2**20
"""Nobody trains on larger files; whoever sends one wants to fill the memory."""
URL_SECONDS = 10
"""For an answer's first byte, and three times that for its last: a server that drips must not hold a run up."""
CHUNK = 2**16


def stream(source: str | Path | bytes | Mapping[str, Any]) -> io.BytesIO | Path:
    """A file to decode from: bytes in memory, or the path itself after a look at its size."""
    if isinstance(source, Mapping):
        source = one_of(source)
    if isinstance(source, bytes):
        return io.BytesIO(limited(source))
    text = str(source)
    if text.startswith("data:"):
        return io.BytesIO(limited(from_data_uri(text)))
    if text.startswith(("http://", "https://")):
        return io.BytesIO(limited(download(text)))
    if is_zipped(text):
        return io.BytesIO(read_member(text, MAX_BYTES))
    return checked(Path(urllib.parse.unquote(text[7:])) if text.startswith("file://") else Path(text))


def is_local(source: str | Path) -> bool:
    """Whether it names a file that lies as it is on this machine."""
    return not str(source).startswith(("data:", "http://", "https://", "file://")) and not is_zipped(str(source))


def one_of(image: Mapping[str, Any]) -> bytes | str:
    """The bytes of a `datasets` image, or else its path."""
    found = image.get("bytes") or image.get("path")
    if not isinstance(found, bytes | str):
        raise ValueError(f"a mapping with neither `bytes` nor `path`, but {sorted(map(str, image))}")
    return found


def from_data_uri(uri: str) -> bytes:
    """What a data URI holds, as base64 or as plain characters."""
    head, _, body = uri.partition(",")
    if head.endswith(";base64"):
        return base64.b64decode("".join(urllib.parse.unquote(body).split()), validate=True)
    return urllib.parse.unquote_to_bytes(body)


def download(url: str) -> bytes:
    """What stands at a URL, or an error when there is too much of it or it comes too slowly."""
    data, deadline = bytearray(), time.monotonic() + 3 * URL_SECONDS
    with urllib.request.urlopen(url, timeout=URL_SECONDS) as answer:
        while (piece := answer.read1(CHUNK)) and len(data) <= MAX_BYTES:
            data += piece
            if time.monotonic() > deadline:
                raise TimeoutError(f"{len(data)} bytes in {3 * URL_SECONDS} seconds, and more to come")
        if answer.length and len(data) <= MAX_BYTES:
            raise ValueError(f"the connection ended {answer.length} bytes early")
    return bytes(data)


def checked(path: Path) -> Path:
    if not path.is_file():
        raise FileNotFoundError("no such file" + (", but a folder" if path.is_dir() else ""))
    if path.stat().st_size > MAX_BYTES:
        raise ValueError(f"{path.stat().st_size} bytes, more than {MAX_BYTES}")
    return path


def limited(data: bytes) -> bytes:
    if len(data) > MAX_BYTES:
        raise ValueError(f"more than {MAX_BYTES} bytes")
    return data


def describe(source: object) -> str:
    """A short name for messages: a data URI or bytes are not printed whole."""
    if isinstance(source, Mapping):
        source = source.get("path") or source.get("bytes") or source
    if isinstance(source, bytes):
        return f"({len(source)} bytes)"
    text = str(source)
    return text[:60] if text.startswith("data:") else text[:500]
