"""A CLIP-style encoder, up to the layer whose features are used.

Enters: pixel_values [N, 3, H, W], uint8 and not yet normalised, or float and ready. Leaves: patch features
[N, P, Dv] of one layer, without class or register tokens.

The tap lies before the encoder's final norm, as in stock Llava: a connector trained behind the norm could not be
exported there. Layers behind the tap are cut off when the encoder is built, because nobody reads them.

N images, P patches, Dv width of the encoder, H W pixels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mllm.types import Normalisation


class VisionEncoder(nn.Module):
    """Wraps the vision model of any transformers class with square patches and a list of layers."""

    def __init__(self, model: Any, feature_layer: int = -2, normalisation: Normalisation | None = None) -> None:
        """`feature_layer` counts hidden states as transformers does: 0 the embeddings, -1 the last layer's output.

        `normalisation` is what the encoder's own image processor does to uint8 pixels.
        """
        super().__init__()
        self.normalisation = normalisation
        self.model: Any = model
        self.num_patches = num_patches(model.config)
        self.width: int = model.config.hidden_size
        self._features: Tensor | None = None
        layers = layer_list(model)
        del layers[last_layer_needed(feature_layer, len(layers)) + 1 :]
        layers[-1].register_forward_hook(self._keep)

    def _keep(self, _module: nn.Module, _inputs: Any, output: Any) -> None:
        self._features = output if isinstance(output, Tensor) else output[0]

    def forward(self, pixel_values: Tensor) -> Tensor:
        """[N, 3, H, W] -> [N, P, Dv], with a gradient only where a weight of the encoder asks for one.

        Raises:
            ValueError: the images are not of the size that the encoder's config promises, or are uint8 and nobody
                told how to normalise them.
        """
        side: int = self.model.config.image_size
        if tuple(pixel_values.shape[2:]) != (side, side):  # DINOv2 takes any size, and P would not be as promised
            raise ValueError(
                f"images of {tuple(pixel_values.shape[2:])} pixels for an encoder of {side} x {side}: "
                f"set the sizes of its image processor to {side}"
            )
        trains = torch.is_grad_enabled() and any(p.requires_grad for p in self.model.parameters())
        with torch.set_grad_enabled(trains):
            self.model(pixel_values=self.normalised(pixel_values).to(self.model.dtype))
        assert self._features is not None, "the encoder never called its last layer"
        features, self._features = self._features, None
        return self.without_prefix(features)  # [N, P, Dv]

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
        side = self.model.config.image_size
        blank = torch.zeros(1, 3, side, side, device=trained[0].device)
        gradients = torch.autograd.grad(self(blank).sum(), trained, allow_unused=True)
        for parameter, gradient in zip(trained, gradients, strict=True):
            parameter.requires_grad_(gradient is not None)

    def without_prefix(self, features: Tensor) -> Tensor:
        """Drop what stands before the patches: a class token (CLIP, ViT), registers too (DINOv2), nothing (SigLIP)."""
        prefix = features.shape[1] - self.num_patches
        allowed = 1 + getattr(self.model.config, "num_register_tokens", 0)
        assert 0 <= prefix <= allowed, f"{features.shape[1]} features for {self.num_patches} patches"
        return features[:, prefix:]


def num_patches(config: Any) -> int:
    """P, from the config of a vision model alone."""
    return (config.image_size // config.patch_size) ** 2


def vision_config(config: Any) -> Any:
    """The config of the vision half, for checkpoints that hold a text half too (CLIP, SigLIP)."""
    return getattr(config, "vision_config", config)


def layer_list(model: Any) -> nn.ModuleList:
    """The transformer's layers: the list that is as long as the config says."""
    depth = model.config.num_hidden_layers
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == depth:
            return module
    raise ValueError(f"{type(model).__name__} has no list of {depth} layers: this encoder is not supported")


def last_layer_needed(feature_layer: int, depth: int) -> int:
    """Index of the layer whose output is the wanted hidden state."""
    state = feature_layer if feature_layer >= 0 else depth + 1 + feature_layer
    if not 1 <= state <= depth:
        raise ValueError(
            f"feature_layer {feature_layer} of an encoder of {depth} layers: expected 1..{depth} or -1..-{depth}"
        )
    return state - 1
