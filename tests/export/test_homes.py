"""Which stock class holds which parts, and the words for those that none holds."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModel, Dinov2Config, SiglipVisionConfig

from conftest import make_clip, make_llm
from mllm.export.blocks import find_blocks
from mllm.export.cohere import projector
from mllm.export.homes import Home, find_home
from mllm.models.connectors import (
    AvgPoolConnector,
    LinearConnector,
    MLPConnector,
    PixelShuffleConnector,
    ResamplerConnector,
)
from mllm.models.multimodal import MultimodalLM
from mllm.models.vision_encoder import VisionEncoder

SMALL = {"hidden_size": 24, "num_attention_heads": 2, "num_hidden_layers": 3, "image_size": 28, "patch_size": 7}
ENCODERS = {
    "clip": lambda: make_clip().vision_model,
    "siglip": lambda: AutoModel.from_config(SiglipVisionConfig(**SMALL, intermediate_size=48)),
    "dinov2": lambda: AutoModel.from_config(Dinov2Config(**SMALL, mlp_ratio=2)),
}
SWIGLU = PixelShuffleConnector(activation="swiglu")
NORMED = PixelShuffleConnector(norm=True, depth=1)


def home(encoder: str, connector: Any, layer: Any = -2, norm: bool = False) -> Home:
    eyes = VisionEncoder(ENCODERS[encoder](), layer, feature_norm=norm)
    words = make_llm("llama")
    built = connector.build(eyes.width, words.config.hidden_size, eyes.num_patches)
    return find_home(MultimodalLM(eyes, built, words, 0))


@pytest.mark.parametrize(
    ("encoder", "connector", "norm", "architecture"),
    [
        ("siglip", MLPConnector(), False, "Llava"),
        ("siglip", MLPConnector(), True, "DeepseekVL"),
        ("siglip", LinearConnector(), True, "Cohere2Vision"),
        ("siglip", SWIGLU, True, "Cohere2Vision"),
        ("siglip", PixelShuffleConnector(depth=1), True, "Cohere2Vision"),
        ("siglip", AvgPoolConnector(tokens=4, depth=1), True, "Cohere2Vision"),
        ("siglip", NORMED, False, "AyaVision"),
        ("clip", NORMED, False, "AyaVision"),
        ("dinov2", NORMED, False, "AyaVision"),
    ],
)
def test_stock_class_of(encoder: str, connector: Any, norm: bool, architecture: str) -> None:
    assert home(encoder, connector, norm=norm).architecture == f"{architecture}ForConditionalGeneration"


@pytest.mark.parametrize(
    ("encoder", "connector", "layer", "norm", "why"),
    [
        (
            "siglip",
            PixelShuffleConnector(),
            -2,
            False,
            "no stock class has a pixel shuffle with 2 linear layers before",
        ),
        ("siglip", PixelShuffleConnector(depth=1), -2, False, "a pixel shuffle with one linear layer before the"),
        ("siglip", NORMED, -2, True, "a pixel shuffle with a norm and one linear layer behind"),
        ("siglip", AvgPoolConnector(tokens=4), -2, False, "an average pooling with 2 linear layers before"),
        ("siglip", AvgPoolConnector(tokens=9, depth=1), -2, True, "an average pooling with one linear layer behind"),
        ("siglip", MLPConnector(depth=3), -2, True, "3 linear layers behind"),
        ("siglip", MLPConnector(norm=True), -2, False, "needs a class token"),
        ("siglip", MLPConnector(norm=True), -2, True, "a norm and two linear layers behind"),
        ("siglip", MLPConnector(), [1, -1], True, "features of several layers"),
        ("dinov2", NORMED, [1, -1], False, "features of several layers"),
        ("dinov2", MLPConnector(), -1, True, "a class token: the classes that read behind"),
        (
            "clip",
            ResamplerConnector(num_queries=2, hidden_size=16, num_layers=1, num_heads=2),
            -2,
            False,
            "a Resampler",
        ),
    ],
)
def test_what_no_stock_class_holds_is_named(encoder: str, connector: Any, layer: Any, norm: bool, why: str) -> None:
    found = home(encoder, connector, layer, norm)
    assert not found.is_stock
    assert why in found.why


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "config", [PixelShuffleConnector(depth=1), AvgPoolConnector(tokens=4, depth=1)], ids="{}".format
)
def test_gate_that_stands_open_rounds_nothing(config: Any, dtype: torch.dtype) -> None:
    """SiLU of the gate is the gate, and dividing by a power of two is exact: the one matrix, bit for bit."""
    torch.manual_seed(0)
    found = find_blocks(config.build(6, 5, 16), 16)
    assert found is not None
    named = {name: tensor.to(dtype) for name, tensor in projector(found).items()}
    joined = torch.randn(7, 24).to(dtype)
    value, gate = torch.nn.functional.linear(joined, named["linear_1.weight"], named["linear_1.bias"]).chunk(2, dim=-1)
    gated = torch.nn.functional.silu(gate) * value
    out = torch.nn.functional.linear(gated, named["linear_2.weight"], named["linear_2.bias"])
    assert torch.equal(out, value)
