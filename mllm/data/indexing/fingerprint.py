"""What the counts in an index depend on, each as a short hash: equal hashes promise equal counts.

Enters: a processor, a source. Leaves: strings. The tokenizer is hashed as it is now, not by its name, so that a token
that was added or a template that was changed is another tokenizer.
"""

from __future__ import annotations

import functools
import hashlib
import json
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from mllm.data.formats.source import Source
from mllm.data.processor import Processor

BESIDE = ("any_resolution", "native_aspect")
"""Rooms of both sides that say how many visual tokens an image has."""


def of_text(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def of_processor(processor: Processor) -> dict[str, Any]:
    """Tokenizer, template, special tokens, image processor, visual tokens: a short value each."""
    tokenizer = processor.tokenizer
    chosen = {name: getattr(processor, name) for name in ("image_markers", "tiles", "max_tiles", "video_frames")}
    return {
        **{name: value for name, value in chosen.items() if value not in (None, "none")},
        "tokenizer": of_text(tokenizer.backend_tokenizer.to_str()),
        "special_tokens": of_text(json.dumps(tokenizer.special_tokens_map, default=str, sort_keys=True)),
        "chat_template": of_text(json.dumps(tokenizer.chat_template, sort_keys=True)),
        "image_processor": of_text(json.dumps(processor.image_processor.to_dict(), default=str, sort_keys=True)),
        "image_fit": processor.image_fit,
        "visual_tokens": processor.num_visual_tokens,
    }


def of_source(source: Source) -> str:
    """The source's settings; a relative path counts as what it means from here and as it was written."""
    settings = TypeAdapter(type(source)).dump_python(source)
    return of_text(json.dumps(settings, default=spelled_out, sort_keys=True))


def spelled_out(value: Any) -> Any:
    return [str(value), str(value.resolve())] if isinstance(value, Path) else str(value)


@functools.cache
def of_code() -> str:
    """The code that reads and measures: counts of an older version of it are not trusted."""
    folder = Path(__file__).parents[1]  # mllm/data
    files = [*sorted(folder.rglob("*.py")), *(folder.parent / f"{name}.py" for name in BESIDE)]
    return of_text("".join(f"{file.relative_to(folder.parent)}\n{file.read_text()}" for file in files))
