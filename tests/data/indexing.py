"""A LLaVA file with faults, its index, and all that an index holds as plain values."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np

from mllm.data.formats.llava import LlavaSource
from mllm.data.index import Index, build_index
from mllm.data.processor import Processor

ROW = 160


def spoil(path: Path) -> Path:
    """Rows 1, 3 and 5 of a LLaVA file cannot be used, each for another reason."""
    records = json.loads(path.read_text())
    records[1]["image"] = "images/none.png"
    del records[3]["conversations"]
    records[5]["conversations"][0]["value"] = "no placeholder"
    path.write_text(json.dumps(records))
    return path


def index_of(path: Path, processor: Processor, max_length: int = ROW, **options: Any) -> Index:
    return build_index([LlavaSource(path=path)], processor, max_length, progress=False, **options)


def ids(index: Index) -> list[str]:
    return index.ids.to_pylist()


def contents(index: Index) -> dict[str, Any]:
    """Every field as plain values."""
    values = {field.name: getattr(index, field.name) for field in fields(index) if field.name != "sources"}
    return {
        name: (str(value.dtype), value.tolist()) if isinstance(value, np.ndarray) else value
        for name, value in values.items()
    }
