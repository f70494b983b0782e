"""Floating-point operations of a training step, from shapes alone: what MFU compares with the clock.

Enters: a model in which it is chosen what trains, and for each step what was in its batches. Leaves: the operations
that the step needs; a multiplication and an addition are two. What the device could do is `peaks`' matter.

Counted are matrix products, as everyone counts them: the LLM's layers by their weights, attention by the pairs of
tokens that may see each other, the head where a token is supervised, encoder and connector per image. A product of a
frozen weight has no gradient of the weight: 4 operations for each weight and token, where a trained one has 6. What
is computed but not needed (padding, masked pairs, layers that gradient checkpointing computes twice) does not count.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from mllm.models.multimodal import MultimodalLM
from mllm.train.losses import num_supervised
from mllm.train.tuning.checkpointing import switched_off
from mllm.types import Batch


@dataclass(frozen=True)
class Work:
    """What was in some batches, as far as it costs."""

    tokens: int = 0
    """Tokens of rows, visual ones among them, without padding."""
    pairs: int = 0
    """A token and a token that it may see, itself included."""
    supervised: int = 0
    images: int = 0

    def __add__(self, other: Work) -> Work:
        sums = (getattr(self, name) + getattr(other, name) for name in self.__dataclass_fields__)
        return Work(*sums)


@dataclass(frozen=True)
class Cost:
    """Operations of a forward and backward pass for each unit of `Work`."""

    per_token: float
    per_pair: float
    per_supervised: float
    per_image: float

    def flops(self, work: Work) -> float:
        """Operations of that work."""
        return (
            self.per_token * work.tokens
            + self.per_pair * work.pairs
            + self.per_supervised * work.supervised
            + self.per_image * work.images
        )


def needed(batch: Batch) -> Work:
    """The work that a micro-batch asks for. A padded token is a sample of its own, of one token, and does not count."""
    position = batch["position_ids"]
    follows, begins = position > 0, int((position == 1).sum())  # each real sample has one token at position 1
    pairs = int((position + 1)[follows].sum()) + begins
    return Work(int(follows.sum()) + begins, pairs, num_supervised(batch), batch["num_images"])


def executed(batch: Batch) -> Work:
    """The work of a kernel that multiplies whole rows, padding and masked pairs among them."""
    rows, length = batch["input_ids"].shape
    return Work(rows * length, rows * length**2, num_supervised(batch), len(batch["pixel_values"]))


def step_flops(cost: Cost, block: Iterable[Batch]) -> float:
    """Operations that one rank's micro-batches of a step need."""
    return cost.flops(sum(map(needed, block), Work()))


def cost_of(model: MultimodalLM) -> Cost:
    """What each unit of work costs this model. To be asked before weights are sharded."""
    visual = trains(model.vision_encoder) or trains(model.connector)
    layers, reached = linear_flops(model.llm.get_decoder(), visual)
    head, _ = linear_flops(model.llm.get_output_embeddings(), reached)
    return Cost(layers, pair_flops(model.llm.config.get_text_config(), reached), head, image_flops(model))


def linear_flops(module: nn.Module, reached: bool) -> tuple[float, bool]:
    """Operations for one token that passes every weight once, and whether a gradient flows in what comes out.

    `reached` says whether one flows in what goes in: then each product has a gradient of its input.
    """
    total = 0.0
    for layer in module.modules():
        own = list(layer.parameters(recurse=False))
        if not isinstance(layer, nn.Embedding):
            for weight in own:
                total += 2 * used_size(layer, weight) * (1 + reached + weight.requires_grad)
        reached = reached or any(weight.requires_grad for weight in own)
    return total, reached


def used_size(layer: Any, weight: Any) -> float:
    """Numbers of a weight that one token is multiplied with: of a matrix all, of a mixture's experts those it takes."""
    shape = getattr(weight, "ds_shape", weight.shape)  # ZeRO stage 3 leaves an empty shard in its place
    if isinstance(layer, nn.Linear):
        return layer.in_features * layer.out_features if weight is layer.weight else 0  # 4-bit weights lie packed
    if len(shape) == 3 and (experts := getattr(layer, "num_experts", 0)) == shape[0]:
        config = getattr(layer, "config", None)
        taken = getattr(layer, "top_k", None) or getattr(config, "num_experts_per_tok", experts)
        return shape.numel() * taken / experts
    return shape.numel() if len(shape) >= 2 else 0


def pair_flops(config: Any, reached: bool) -> float:
    """Operations for one pair of tokens in all layers and heads: a product with the key, one with the value, and two
    gradients of each."""
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    key = getattr(config, "qk_head_dim", None) or head_dim  # DeepSeek's keys and values differ in width
    value = getattr(config, "v_head_dim", None) or head_dim
    return 2 * (key + value) * config.num_attention_heads * config.num_hidden_layers * (3 if reached else 1)


def image_flops(model: MultimodalLM) -> float:
    """Operations of encoder and connector for one image, counted on tensors without data: each connector and encoder
    has its own way from patches to tokens, but all have one size of image."""
    encoder = model.vision_encoder
    side, pixel = encoder.grid.side, torch.uint8 if encoder.normalisation else torch.float32
    pixels = torch.zeros(1, 3, side, side, device="meta", dtype=pixel)
    width = next(model.connector.parameters()).dtype
    features = torch.zeros(1, encoder.num_patches, encoder.width, device="meta", dtype=width)
    features.requires_grad_(trains(encoder))
    return counted(encoder, pixels) + counted(model.connector, features)


def counted(module: nn.Module, inputs: torch.Tensor) -> float:
    """Operations of one call, backwards too where something trains. Nothing is computed."""
    from torch.utils.flop_counter import FlopCounterMode

    shapes = {name: without_data(tensor) for name, tensor in (*module.named_parameters(), *module.named_buffers())}
    plain, meta = switched_off(module), torch.device("meta")  # what is computed twice is needed once
    with plain, meta, torch.enable_grad(), FlopCounterMode(display=False) as counter:
        out = torch.func.functional_call(module, shapes, (inputs,))
        if out.requires_grad:
            out.backward(torch.empty_like(out))
    return float(counter.get_total_flops())


def without_data(tensor: Any) -> torch.Tensor:
    shape = getattr(tensor, "ds_shape", tensor.shape)
    return torch.empty(shape, dtype=tensor.dtype, device="meta").requires_grad_(tensor.requires_grad)


def trains(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())
