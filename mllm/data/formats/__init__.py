"""The known data formats. `SourceConfig`, the union of their configuration classes, is the registry.

To add one: a file beside these whose class has a literal `format` and a `samples` method, and its name in the union.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from mllm.data.formats.captions import CaptionsSource
from mllm.data.formats.llava import LlavaSource
from mllm.data.formats.messages import MessagesSource

SourceConfig = Annotated[LlavaSource | MessagesSource | CaptionsSource, Field(discriminator="format")]
