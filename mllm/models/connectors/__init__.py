"""The known connectors. `ConnectorConfig`, the union of their configuration classes, is the registry.

To add one: a file beside these with a configuration class (a literal `type`, `num_tokens`, `build`), its name in the
union. The contract tests of `tests/models/test_connectors.py` are then its own.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from mllm.models.connectors.avg_pool import AvgPoolConnector
from mllm.models.connectors.c_abstractor import CAbstractorConnector
from mllm.models.connectors.linear import LinearConnector
from mllm.models.connectors.mlp import MLPConnector
from mllm.models.connectors.pixel_shuffle import PixelShuffleConnector
from mllm.models.connectors.qformer import QFormerConnector
from mllm.models.connectors.resampler import ResamplerConnector

ConnectorConfig = Annotated[
    LinearConnector
    | MLPConnector
    | AvgPoolConnector
    | PixelShuffleConnector
    | QFormerConnector
    | ResamplerConnector
    | CAbstractorConnector,
    Field(discriminator="type"),
]
