"""The known data formats. `SourceConfig`, the union of their configuration classes, is the registry.

To add one: a file beside these whose class has a literal `format`, a `samples` method and, if its records can be told
by their keys, `recognises`; its name in the union, and in `auto.FORMATS`.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Discriminator, Tag

from mllm.data.formats.auto import AutoSource
from mllm.data.formats.captions import CaptionsSource
from mllm.data.formats.coco import CocoSource
from mllm.data.formats.fields import FieldsSource
from mllm.data.formats.interleaved import InterleavedSource
from mllm.data.formats.llava import LlavaSource
from mllm.data.formats.messages import MessagesSource
from mllm.data.formats.source import Source
from mllm.data.formats.texts_images import TextsImagesSource


def format_of(source: Any) -> Any:
    """The `format` of a source; without one, the records are asked. None of what is no source."""
    if isinstance(source, dict):
        return source.get("format", "auto")
    return getattr(source, "format", None) if isinstance(source, Source) else None


SourceConfig = Annotated[
    Annotated[AutoSource, Tag("auto")]
    | Annotated[LlavaSource, Tag("llava")]
    | Annotated[MessagesSource, Tag("messages")]
    | Annotated[CaptionsSource, Tag("captions")]
    | Annotated[TextsImagesSource, Tag("texts_images")]
    | Annotated[InterleavedSource, Tag("interleaved")]
    | Annotated[FieldsSource, Tag("fields")]
    | Annotated[CocoSource, Tag("coco")],
    Discriminator(format_of),
]
