"""A CLIP-style encoder, up to the layer whose features are used.

Enters: pixel_values [N, 3, H, W], uint8 and not yet normalised, or float and ready. Leaves: patch features
[N, P, Dv] of one layer, or of several side by side, without class or register tokens.

The tap lies before the encoder's final norm, as in stock Llava, or behind it, as in DeepseekVL and Cohere2Vision: a
norm is not linear, so a connector trained at the one cannot be exported to a class that reads at the other. Layers
behind the last tap are cut off when the encoder is built, because nobody reads them.

N images, P patches, Dv width of the features, H W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mllm.models.vision_grid import Grid, grid
from mllm.types import Normalisation

PREFIX = ("class_embedding", "cls_token", "distillation_token", "register_tokens")
"""How the families name the parameters of what stands before the patches."""
FINAL_NORM = ("post_layernorm", "layernorm", "norm")
"""How they name the norm behind the last layer: CLIP and SigLIP; ViT and DINOv2; DINOv3."""


class VisionEncoder(nn.Module):
    """Wraps the vision model of any transformers class with square patches and a list of layers."""

    def __init__(
        self,
        model: Any,
        feature_layer: int | list[int] = -2,
        normalisation: Normalisation | None = None,
        runs_at: Grid | None = None,
        feature_norm: bool = False,
    ) -> None:
        """`feature_layer` counts hidden states as transformers does: 0 the embeddings, -1 the last layer's output;
        the features of several stand side by side, in the order of the list (VipLlava).

        `normalisation` is what the encoder's own image processor does to uint8 pixels, `runs_at` the grid where that
        is not the config's. With `feature_norm` the features of each tap go through the encoder's final norm; those of
        the last layer are then its `last_hidden_state`, except CLIP's, whose own norm sees the class token alone.
        """
        super().__init__()
        self.normalisation = normalisation
        self.model: Any = model
        self.grid = runs_at or grid(model.config)
        self.num_patches = self.grid.num_patches
        self.num_prefix_tokens = num_prefix_tokens(model)
        self.taps = taps(feature_layer, layers := layer_list(model))
        self.width: int = len(self.taps) * model.config.hidden_size
        self.feature_norm = feature_norm
        norm = final_norm(model) if feature_norm else None
        self._features: dict[int, Tensor] = {}
        del layers[max(self.taps) + 1 :]
        for layer in set(self.taps):
            layers[layer].register_forward_hook(partial(self._keep, layer, norm))

    def _keep(self, layer: int, norm: nn.Module | None, _module: nn.Module, _inputs: Any, output: Any) -> None:
        """Inside the model's own forward pass, where FSDP and ZeRO have its weights together."""
        state = output if isinstance(output, Tensor) else output[0]
        self._features[layer] = norm(state) if norm else state

    def forward(self, pixel_values: Tensor, grids: Sequence[tuple[int, int]] = ()) -> Tensor:
        """[N, 3, H, W] -> [N, P, Dv], with a gradient only where a weight of the encoder asks for one. `grids` are rows
        and columns of images that keep their aspect, and travel in squares (`native_aspect.py`); what stands behind
        their own patches means nothing.

        Raises:
            ValueError: the images are not of the size that the encoder's config promises, are uint8 and nobody told
                how to normalise them, or become another number of tokens than promised.
        """
        side = self.grid.side
        if tuple(pixel_values.shape[2:]) != (side, side):  # DINOv2 takes any size, and P would not be as promised
            raise ValueError(
                f"images of {tuple(pixel_values.shape[2:])} pixels for an encoder of {side} x {side}: "
                f"set the sizes of its image processor to {side}"
            )
        trains = torch.is_grad_enabled() and any(p.requires_grad for p in self.model.parameters())
        with torch.set_grad_enabled(trains):
            self.model(**self.inputs(self.normalised(pixel_values).to(self.model.dtype), grids))
        features, self._features = self._features, {}
        kept = [self.without_prefix(features[layer]) for layer in self.taps]
        return torch.cat(kept, dim=-1) if len(kept) > 1 else kept[0]  # [N, P, Dv]

    def inputs(self, pixels: Tensor, grids: Sequence[tuple[int, int]] = ()) -> dict[str, Any]:
        """[N, 3, H, W] as the model takes it: SigLIP2 NaFlex wants patches and the shape of their grid."""
        if self.model.config.model_type != "siglip2_vision_model":
            return {"pixel_values": pixels}
        images, across, patch = len(pixels), self.grid.across, self.grid.patch
        blocks = pixels.unflatten(3, (across, patch)).unflatten(2, (across, patch))  # [N, 3, across, p, across, p]
        shapes = torch.tensor(
            grids or [(across, across)] * images, device="cpu"
        )  # read as numbers: no wait for a device
        own = shapes.prod(1, keepdim=True).to(pixels.device)  # [N, 1]
        return {
            "pixel_values": blocks.permute(0, 2, 4, 3, 5, 1).reshape(images, self.num_patches, -1),  # [N, P, p * p * 3]
            # without grids no patch is padding
            "pixel_attention_mask": (torch.arange(self.num_patches, device=pixels.device) < own).int()
            if grids
            else None,
            "spatial_shapes": shapes,
        }

    def normalised(self, pixel_values: Tensor) -> Tensor:
        """[N, 3, H, W] float32 of uint8; float as it is."""
        if pixel_values.dtype != torch.uint8:
            return pixel_values
        if self.normalisation is None:
            raise ValueError(
                "uint8 pixels for an encoder that came without preprocessor_config.json: put the file beside its "
                "weights, it says how pixels are normalised"
            )
        return self.normalisation(pixel_values)

    def freeze_behind_tap(self) -> None:
        """Freeze what no feature depends on (final norm, pooler): DDP would wait for gradients that never come."""
        trained = [p for p in self.parameters() if p.requires_grad]
        blank = torch.zeros(1, 3, self.grid.side, self.grid.side, device=trained[0].device)
        gradients = torch.autograd.grad(self(blank).sum(), trained, allow_unused=True)
        for parameter, gradient in zip(trained, gradients, strict=True):
            parameter.requires_grad_(gradient is not None)

    def without_prefix(self, features: Tensor) -> Tensor:
        """Drop what stands before the patches: a class token (CLIP, ViT), registers too (DINOv2), nothing (SigLIP)."""
        before, patches = self.num_prefix_tokens, self.num_patches
        if features.shape[1] != before + patches:
            raise ValueError(
                f"{type(self.model).__name__} makes {features.shape[1]} tokens of an image: expected {before} before "
                f"the patches and {patches} patches ({self.grid}). This encoder is not supported"
            )
        return features[:, before:]


def num_prefix_tokens(model: nn.Module) -> int:
    """Tokens that stand before the patches, counted from the parameters that hold them."""
    return sum(
        parameter.shape[-2] if parameter.ndim > 1 else 1
        for name, parameter in model.named_parameters()
        if name.rpartition(".")[2] in PREFIX
    )


def layer_list(model: Any) -> nn.ModuleList:
    """The transformer's layers: the list that is as long as the config says."""
    depth = model.config.num_hidden_layers
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == depth:
            return module
    raise ValueError(f"{type(model).__name__} has no list of {depth} layers: this encoder is not supported")


def final_norm(model: Any) -> nn.Module:
    """The norm behind the last layer; transformers 4.57 has CLIP's and SigLIP's one level down."""
    inside = getattr(model, "vision_model", model)
    for name in FINAL_NORM:
        if isinstance(norm := getattr(inside, name, None), nn.Module):
            return norm
    raise ValueError(f"{type(model).__name__} has no final norm that is known here: set model.feature_norm to false")


def taps(feature_layer: int | list[int], layers: nn.ModuleList) -> list[int]:
    """Indices of the layers whose outputs are the wanted hidden states."""
    wanted = feature_layer if isinstance(feature_layer, list) else [feature_layer]
    if not wanted:
        raise ValueError("feature_layer is an empty list: name at least one layer")
    return [last_layer_needed(layer, len(layers)) for layer in wanted]


def last_layer_needed(feature_layer: int, depth: int) -> int:
    """Index of the layer whose output is the wanted hidden state."""
    state = feature_layer if feature_layer >= 0 else depth + 1 + feature_layer
    if not 1 <= state <= depth:
        raise ValueError(
            f"feature_layer {feature_layer} of an encoder of {depth} layers: expected 1..{depth} or -1..-{depth}"
        )
    return state - 1
