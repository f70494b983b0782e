"""A tiny random model of every family of vision encoders, and its folder in the Hub's format."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import (
    BitImageProcessor,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    Siglip2Config,
    Siglip2ImageProcessor,
    Siglip2Model,
    SiglipConfig,
    SiglipImageProcessor,
    SiglipModel,
    ViTConfig,
    ViTImageProcessor,
    ViTModel,
)

from conftest import make_clip, make_image_processor

WIDTH, DEPTH = 24, 4
HALF = {"hidden_size": WIDTH, "intermediate_size": 48, "num_attention_heads": 2, "num_hidden_layers": DEPTH}
TEXT = {**HALF, "num_hidden_layers": 1, "vocab_size": 64, "max_position_embeddings": 16}
PLAIN = {"hidden_size": WIDTH, "num_attention_heads": 2, "num_hidden_layers": DEPTH, "patch_size": 14}
PREFIX = {"clip": 1, "siglip": 0, "naflex": 0, "vit": 1, "dinov2": 1, "dinov2_registers": 1 + 4, "dinov3": 1 + 4}
SIDE = {"clip": 28, "siglip": 42, "naflex": 28, "vit": 28, "dinov2": 28, "dinov2_registers": 28, "dinov3": 42}
IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}


def square(side: int) -> dict[str, int]:
    return {"height": side, "width": side}


def crop(side: int) -> BitImageProcessor:
    """As DINOv2's checkpoints have it: their configs say another size."""
    return BitImageProcessor(size={"shortest_edge": side + 4}, crop_size=square(side), **IMAGENET)


MODELS: dict[str, Callable[[], torch.nn.Module]] = {
    "clip": make_clip,
    "siglip": lambda: SiglipModel(
        SiglipConfig(text_config=TEXT, vision_config={**HALF, "image_size": 42, "patch_size": 14})
    ),
    "naflex": lambda: Siglip2Model(
        Siglip2Config(text_config=TEXT, vision_config={**HALF, "num_patches": 9, "patch_size": 14})
    ),
    "vit": lambda: ViTModel(ViTConfig(**HALF, image_size=28, patch_size=14)),
    "dinov2": lambda: Dinov2Model(Dinov2Config(**PLAIN, image_size=70)),
    "dinov2_registers": lambda: Dinov2WithRegistersModel(
        Dinov2WithRegistersConfig(**PLAIN, image_size=70, num_register_tokens=4)
    ),
    "dinov3": lambda: DINOv3ViTModel(
        DINOv3ViTConfig(**HALF, image_size=28, patch_size=14, num_register_tokens=4, layerscale_value=0.5)
    ),
}
IMAGE_PROCESSORS = {
    "clip": make_image_processor,
    "siglip": lambda: SiglipImageProcessor(size=square(42)),
    "naflex": lambda: Siglip2ImageProcessor(patch_size=14, max_num_patches=4),
    "vit": lambda: ViTImageProcessor(size=square(28)),
    "dinov2": lambda: crop(28),
    "dinov2_registers": lambda: crop(28),
}
DINOV3 = {
    "image_processor_type": "DINOv3ViTImageProcessorFast",
    **{"do_resize": True, "size": square(42), "resample": 2, "do_center_crop": None, "crop_size": None},
    **{"do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True, **IMAGENET},
}
"""As the Hub has it: the class behind that name needs torchvision."""


def save_encoder(model: torch.nn.Module, family: str, folder: Path) -> None:
    """A whole checkpoint where the family has a text half."""
    model.save_pretrained(folder)
    if family in IMAGE_PROCESSORS:
        IMAGE_PROCESSORS[family]().save_pretrained(folder)
    else:
        (folder / "preprocessor_config.json").write_text(json.dumps(DINOV3))
