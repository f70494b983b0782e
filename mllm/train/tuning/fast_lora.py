"""LoRA in half precision without the detour: the same adapters of peft, the same files, fewer passes over memory.

Enters: a model with adapters, computed in bfloat16. Leaves: the same model, whose adapted layers compute otherwise
while a gradient is wanted. peft keeps adapters in float32, casts the states up to them, and autocast casts them down
again; product, scale and sum are three passes more. Here small matrices are cast to the states, layers that read the
same states (query, key and value; gate and up) share their first product, and the second is added to the layer's own
output as it is computed. Nothing else rounds, and one rounding falls away.

Plain LoRA alone: with dropout, DoRA, several adapters, 4-bit weights or weights in shards peft computes as before.

M rows, K width of the input, N of the output, R rank.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from mllm.models.multimodal import MultimodalLM
from mllm.train import engine
from mllm.train.tuning.fp8 import FrozenFp8Linear

if TYPE_CHECKING:
    from accelerate import Accelerator

TOGETHER = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Layers of one parent that are given the same states, by the names that most families use."""


def switch_on(accelerator: Accelerator, model: MultimodalLM, mixed_precision: str) -> int:
    """Where it is exact but for rounding, and all is computed in half precision; the number of layers."""
    if "peft" not in sys.modules:
        return 0
    restore(model)
    is_half = mixed_precision == "bf16" or model.llm.dtype == torch.bfloat16
    return convert(model) if is_half and not engine.shards_weights(accelerator) else 0


def convert(model: nn.Module) -> int:
    """Every adapted layer that can, in place; their number."""
    from peft.tuners.lora.layer import Linear

    count = 0
    for parent in model.modules():
        layers = {name: child for name, child in parent.named_children() if type(child) is Linear and is_simple(child)}
        for group in groups(layers):
            shared = SharedProduct(group)
            for place, layer in enumerate(group):
                layer.__class__ = fast_linear()
                layer.shared, layer.place = shared, place
        count += len(layers)
    return count


def restore(model: nn.Module) -> None:
    """Undo what an earlier training in this process did."""
    from peft.tuners.lora.layer import Linear

    for layer in model.modules():
        if isinstance(layer, fast_linear()):
            del layer.shared, layer.place
            layer.__class__ = Linear  # type: ignore[assignment]


def groups(layers: dict[str, Any]) -> Iterator[list[Any]]:
    """Those that share, and each of the others alone."""
    left = dict(layers)
    for names in TOGETHER:
        if members := [left.pop(name) for name in names if name in left]:
            yield members
    yield from ([layer] for layer in left.values())


def is_simple(layer: Any) -> bool:
    """Is it W x + scale * B A x, and nothing beside?"""
    return (
        list(layer.active_adapters) == list(layer.lora_A) == ["default"]
        and isinstance(layer.lora_dropout["default"], nn.Identity)
        and not layer.lora_variant
        and not layer.lora_bias["default"]
        and type(layer.base_layer) in (nn.Linear, FrozenFp8Linear)
    )


class SharedProduct:
    """A x of several layers, computed as one product when the first of them is called."""

    def __init__(self, layers: list[Any]) -> None:
        self.first = [layer.lora_A["default"] for layer in layers]
        self.states: Tensor | None = None
        self.left: list[Tensor | None] = []

    def take(self, place: int, states: Tensor, rows: Tensor) -> Tensor:
        """[M, K] -> [M, R] of the layer at that place. `states` are what the layer was given: those of another call
        are another tensor."""
        if self.states is not states or self.left[place] is None:
            matrix = torch.cat([first.weight.to(rows.dtype) for first in self.first])  # [sum of R, K]
            ranks = [first.out_features for first in self.first]
            self.states, self.left = states, list(linear(rows, matrix).split(ranks, dim=-1))
        found, self.left[place] = self.left[place], None
        assert found is not None, place
        if all(product is None for product in self.left):
            self.states = None
        return found


@cache
def fast_linear() -> Any:
    """The class, made when peft is there."""
    from peft.tuners.lora.layer import Linear

    class FastLoraLinear(Linear):
        """peft's own layer with another forward pass while a gradient is wanted."""

        shared: SharedProduct
        place: int

        def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            """[..., K] -> [..., N]."""
            if not torch.is_grad_enabled() or self.disable_adapters or self.merged or args or kwargs:
                return super().forward(x, *args, **kwargs)
            rows = x.reshape(-1, x.shape[-1])  # [M, K]
            out = self.base_layer(rows)  # [M, N]
            low = self.shared.take(self.place, x, rows.to(out.dtype))  # [M, R]
            second: Any = self.lora_B["default"].weight  # [N, R]
            out.addmm_(low, second.to(out.dtype).t(), alpha=self.scaling["default"])
            return out.view(*x.shape[:-1], -1)

    return FastLoraLinear
