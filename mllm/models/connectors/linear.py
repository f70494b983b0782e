"""One matrix: each patch becomes one visual token (the first LLaVA; MiniGPT-4 behind its Q-Former).

Enters: patch features [N, P, Dv]. Leaves: visual tokens [N, P, D].
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import nn

from mllm.models.connectors.connector import Connector


@dataclass
class LinearConnector(Connector):
    """A single linear layer with a bias."""

    per_patch: ClassVar[bool] = True
    type: Literal["linear"] = "linear"

    def build(self, encoder_width: int, llm_width: int, num_patches: int) -> nn.Module:
        return nn.Linear(encoder_width, llm_width)
