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
from mllm.models.connectors.pixel_shuffle import Shuffle
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("config", "exact"),
    [
        (LinearConnector(), True),
        (PixelShuffleConnector(depth=1), True),
        (AvgPoolConnector(tokens=9, depth=1), True),
        (AvgPoolConnector(tokens=4, depth=1), False),  # blocks of 3 x 3: no short number divides by 9
    ],
)
def test_one_matrix_in_their_two_layers_is_rounded_no_more_than_the_matrix(
    config: Any, exact: bool, dtype: torch.dtype
) -> None:
    """Weights of `dtype`, read in float32, as the proof reads them."""
    torch.manual_seed(0)
    connector = config.build(6, 5, 36).to(dtype).float()
    found = find_blocks(connector, 36)
    assert found is not None
    named = {name: tensor.to(dtype).float() for name, tensor in projector(found).items()}
    features = torch.randn(2, 36, 6)
    joined = features if found.factor == 1 else Shuffle(found.factor)(features)
    value, gate = torch.nn.functional.linear(joined, named["linear_1.weight"], named["linear_1.bias"]).chunk(2, dim=-1)
    gated = torch.nn.functional.silu(gate) * value
    out = torch.nn.functional.linear(gated, named["linear_2.weight"], named["linear_2.bias"])
    off = 2e-5 if dtype is torch.float16 and not exact else 1e-6
    torch.testing.assert_close(out, connector(features), rtol=0, atol=off)
