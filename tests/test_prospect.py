"""A run says before it trains what it will be exported as, and what would have made it a stock class."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from export.stages import make_parts
from mllm.config import RunConfig
from mllm.data.loader import DataConfig
from mllm.export.homes import find_home
from mllm.models.build import ModelConfig, build_model
from mllm.models.connectors import AvgPoolConnector, MLPConnector, PixelShuffleConnector, QFormerConnector
from mllm.oracle import skeleton
from mllm.prospect import prospect
from mllm.train.settings import TrainConfig
from mllm.train.trainable import LearningRates, Lora

QFORMER = QFormerConnector(num_queries=3, hidden_size=16, num_layers=2, num_heads=2)


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shelf")
    for encoder in ("clip", "siglip_fine"):
        make_parts(folder / encoder, encoder)
    return folder


def run(folder: Path, connector: Any, data: DataConfig | None = None, **more: Any) -> RunConfig:
    train = TrainConfig(output_dir=folder, learning_rate=LearningRates(connector=1e-3, llm=1e-3), lora=Lora(rank=2))
    parts = ModelConfig(str(folder / "encoder"), str(folder / "llm"), connector, **more)
    return RunConfig(train, data or DataConfig(), parts)


@pytest.mark.parametrize(
    ("encoder", "connector", "more", "instead"),
    [
        ("siglip_fine", PixelShuffleConnector(depth=1), {}, {"norm": True}),
        ("clip", PixelShuffleConnector(), {}, {"norm": True, "activation": "swiglu"}),
        ("siglip_fine", AvgPoolConnector(tokens=4), {}, {"feature_norm": True, "depth": 1}),
        ("siglip_fine", MLPConnector(depth=3), {"feature_norm": True}, {"depth": 2}),
        ("clip", MLPConnector(), {"feature_norm": True}, {"feature_norm": False}),
    ],
)
def test_settings_that_are_named_do_make_it_the_class_that_is_named(
    shelf: Path, encoder: str, connector: Any, more: dict[str, Any], instead: dict[str, Any]
) -> None:
    config = run(shelf / encoder, connector, **more)
    found = prospect(config, skeleton(config))
    assert found.exports_as == "remote code"
    for name, value in instead.items():
        place = "model" if name == "feature_norm" else "model.connector"
        assert f"{place}.{name}: {str(value).lower()}" in found.instead
        setattr(config.parts() if name == "feature_norm" else connector, name, value)
    home = find_home(build_model(config.parts(), 0))
    assert home.is_stock
    assert found.instead.endswith(f" would make it {home.architecture}")
    assert str(prospect(config, skeleton(config))) == f"exports as {home.architecture}: {home.why}"


@pytest.mark.parametrize(
    ("connector", "data", "exports_as", "why"),
    [
        (QFORMER, None, "remote code", "a QFormer behind any encoder"),
        (MLPConnector(), DataConfig(image_fit="crop"), "nothing", "data.image_fit: crop is not exported"),
        (QFormerConnector(instruct=True, hidden_size=16, num_heads=2), None, "nothing", "connector.instruct: true"),
    ],
)
def test_what_no_setting_mends_is_said_alone(
    shelf: Path, connector: Any, data: DataConfig | None, exports_as: str, why: str
) -> None:
    config = run(shelf / "clip", connector, data)
    found = prospect(config, skeleton(config))
    assert (found.exports_as, found.instead) == (exports_as, "")
    assert why in found.why
