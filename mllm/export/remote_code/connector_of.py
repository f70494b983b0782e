"""The connector of a model by its settings. The exported folder has a file of this name for its own connector alone.

Enters: settings as `config.json` holds them, widths and patches. Leaves: the module [N, P, Dv] -> [N, V, D].
"""

from __future__ import annotations

from typing import Any

from pydantic import TypeAdapter
from torch import nn

from mllm.models.connectors import ConnectorConfig


def make_connector(settings: dict[str, Any], encoder_width: int, llm_width: int, num_patches: int) -> nn.Module:
    connector: Any = TypeAdapter(ConnectorConfig).validate_python(settings)
    return connector.build(encoder_width, llm_width, num_patches)  # type: ignore[no-any-return]
