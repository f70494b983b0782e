"""A good record of each format, and the short way from a record to its sample."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mllm.data.formats.captions import CaptionsSource
from mllm.data.formats.interleaved import InterleavedSource
from mllm.data.formats.llava import LlavaSource
from mllm.data.formats.messages import MessagesSource
from mllm.data.formats.source import Source
from mllm.data.formats.texts_images import TextsImagesSource
from mllm.types import Sample

CLASSES: dict[str, type[Source]] = {
    "llava": LlavaSource,
    "messages": MessagesSource,
    "captions": CaptionsSource,
    "texts_images": TextsImagesSource,
    "interleaved": InterleavedSource,
}
DATA_URI = "data:image/png;base64,AAAA"
SAID = {"role": "assistant", "content": "red"}
GOOD = {
    "llava": {
        "id": "g",
        "image": "a.png",
        "conversations": [{"from": "human", "value": "<image>what?"}, {"from": "gpt", "value": "red"}],
    },
    "messages": {"id": "g", "messages": [{"role": "user", "content": "hello"}, SAID]},
    "captions": {"id": "g", "image": "a.png", "caption": "a red circle"},
    "texts_images": {"id": "g", "images": ["a.png"], "texts": [{"user": "what?", "assistant": "red"}]},
    "interleaved": {"id": "g", "texts": ["a circle", None, "that is red"], "images": [None, "a.png", None]},
}


def read(folder: Path, kind: str, text: str | bytes, name: str = "data.jsonl", **options: Any) -> list[Any]:
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return list(CLASSES[kind](path=path, **options).read())


def read_one(folder: Path, kind: str, record: dict[str, Any], **options: Any) -> Sample:
    [sample] = read(folder, kind, json.dumps(record), **options)
    assert isinstance(sample, Sample), sample
    return sample


def llava(*turns: tuple[str, Any], **keys: Any) -> dict[str, Any]:
    return {"conversations": [{"from": who, "value": value} for who, value in turns], **keys}


def asked(content: Any, **keys: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": content}, SAID], **keys}
