"""What every connector promises.

Enters: patch features [N, P, Dv]. Leaves: visual tokens [N, V, D]. The configuration answers from numbers alone how
many visual tokens P patches become, so that the data side can plan before any weight is loaded.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from mllm.schema import Schema


@dataclass
class Connector(Schema):
    """Base of the connector configurations; `type` in each subclass is the name that YAML uses."""

    in_rows: ClassVar[bool] = True
    """Do the visual tokens stand for places of a square grid, in reading order?"""

    per_patch: ClassVar[bool] = False
    """Is each visual token made of one patch alone, so that there may be any number of them?"""

    def num_tokens(self, num_patches: int) -> int:
        """V for P patches: as many, unless a connector says otherwise."""
        return num_patches

    def build(self, encoder_width: int, llm_width: int, num_patches: int) -> nn.Module:
        """The module [N, P, encoder_width] -> [N, V, llm_width].

        One that begins by making the patches fewer, without a weight and for a linear layer, may have two members more:
        `pooled`, [N, P, encoder_width] -> [N, T, encoder_width], which the module takes in the place of the features
        to the same end; and `pooling`, which tells it in words. Caches then keep the fewer (`MultimodalLM.pooled`).
        """
        raise NotImplementedError(f"{type(self).__name__} must build a module")
