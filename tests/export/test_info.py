"""`mllm info` knows before training who will load the model, and export agrees with it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from conftest import run_mllm
from mllm import oracle
from mllm.data.loader import DataConfig
from mllm.export import export
from mllm.export.homes import find_home
from mllm.export.trained import load
from mllm.models.connectors import (
    AvgPoolConnector,
    LinearConnector,
    MLPConnector,
    PixelShuffleConnector,
    QFormerConnector,
)
from stages import make_parts, make_stage

QFORMER = QFormerConnector(num_queries=3, hidden_size=16, num_layers=2, num_heads=2)
CELLS: dict[str, Any] = {
    "clip, mlp": ({}, {}, "LlavaForConditionalGeneration", "its own Llava class", "issue 25814"),
    "siglip, mlp": ({"encoder": "siglip"}, {}, "LlavaForConditionalGeneration", "its own Llava class", "to gguf"),
    "dinov2, mlp": ({"encoder": "dinov2"}, {}, "LlavaForConditionalGeneration", "takes no dinov2", "issue 25814"),
    "two layers": ({}, {"feature_layer": [-2, 1]}, "LlavaForConditionalGeneration", "reads one layer", "several"),
    "linear": ({}, {"connector": LinearConnector()}, "LlavaForConditionalGeneration", "no activation", "not two"),
    "norm": ({}, {"connector": MLPConnector(norm=True)}, "VipLlavaForConditionalGeneration", "by itself", "not two"),
    "behind the norm": (
        {"encoder": "siglip"},
        {"feature_norm": True},
        "DeepseekVLForConditionalGeneration",
        "by itself",
        "reads before it",
    ),
    "pixel shuffle behind the norm": (
        {"encoder": "siglip"},
        {"feature_norm": True, "connector": PixelShuffleConnector(depth=1)},
        "Cohere2VisionForConditionalGeneration",
        "--model-impl transformers",
        "not two linear",
    ),
    "q-former": ({"encoder": "siglip"}, {"connector": QFORMER}, "remote code", "trust-remote-code", "not two linear"),
    "neox": ({"encoder": "siglip", "llm": "gpt_neox"}, {}, "LlavaForConditionalGeneration", "own Llava", "gpt_neox"),
}


FAST = ("siglip, mlp", "q-former")
"""The others in `make test-export`."""


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n in FAST else pytest.mark.long) for n in CELLS])
def test_answer_before_training_is_what_export_decides(name: str, tmp_path: Path) -> None:
    parts, stage, architecture, vllm, llama_cpp = CELLS[name]
    make_parts(tmp_path, **parts)
    folder = make_stage(tmp_path, **stage)
    found = oracle.info(str(folder / "config.yaml"))
    assert found.exports_as == architecture
    assert found.exports_as == (find_home(load(str(folder)).model).architecture or "remote code")
    answers = {loader.loader: loader for loader in found.loaders}
    assert answers["transformers"].loads
    assert vllm in answers["vLLM"].why
    assert llama_cpp in answers["llama.cpp"].why
    assert answers["llama.cpp"].loads == ("to gguf" in llama_cpp)


def test_command_tells_parts_tokens_and_loaders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    make_parts(tmp_path)
    stage = make_stage(tmp_path, PixelShuffleConnector(), lora=True)
    assert run_mllm(monkeypatch, "info", stage) == 0
    told = capsys.readouterr().out
    assert "1 visual tokens" in told
    assert (
        "model.connector.norm: true, model.connector.activation: swiglu would make it AyaVisionForConditional" in told
    )
    for word in ("transformers", "vLLM", "SGLang", "llama.cpp", "pixel_shuffle"):
        assert word in told
    assert run_mllm(monkeypatch, "info", stage, "--json") == 0
    told = json.loads(capsys.readouterr().out)
    trained = {part["part"]: part["trained"] for part in told["parts"]}
    assert trained["vision_encoder"] == 0
    lora = load_adapter(stage)
    assert trained["llm"] == sum(tensor.numel() for tensor in lora.values())
    assert told["visual_tokens_per_image"] == 1


def test_tiles_and_markers_have_a_range_of_tokens_and_no_home_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    make_parts(tmp_path, encoder="siglip")
    config = make_stage(tmp_path, data=DataConfig(tiles="dynamic", max_tiles=6)) / "config.yaml"
    assert run_mllm(monkeypatch, "info", config) == 0
    told = capsys.readouterr().out
    assert "4 to 28 visual tokens, in tiles of 4" in told
    assert "data.tiles: dynamic is not exported" in told
    assert run_mllm(monkeypatch, "info", config, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["visual_tokens_range"], found["exports_as"]) == ([4, 28], "nothing")
    assert not any(loader["loads"] for loader in found["loaders"])
    for to in ("transformers", "gguf"):
        with pytest.raises(ValueError, match=r"data\.tiles: dynamic is not exported"):
            export(str(config.parent), tmp_path / to, to)  # type: ignore[arg-type]


def test_tiles_at_any_resolution_are_llava_nexts_and_their_tokens_follow_the_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    make_parts(tmp_path, encoder="siglip")
    stage = make_stage(tmp_path, data=DataConfig(tiles="anyres"))
    assert run_mllm(monkeypatch, "info", stage, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["visual_tokens_range"], found["exports_as"]) == ([4, 24], "LlavaNextForConditionalGeneration")
    answers = {loader["loader"]: loader for loader in found["loaders"]}
    assert answers["vLLM"]["why"] == "with its own LlavaNext class"
    assert answers["SGLang"]["why"] == "through its Transformers backend, by itself"
    assert "tiles with a newline" in answers["llama.cpp"]["why"]
    assert {part["part"]: part["trained"] for part in found["parts"]}["image_newline"] == 32
    with pytest.raises(ValueError, match="tiles with a newline"):
        export(str(stage), tmp_path / "gguf", "gguf")
    pooled = make_stage(tmp_path, AvgPoolConnector(tokens=1), data=DataConfig(tiles="anyres"))
    assert run_mllm(monkeypatch, "info", pooled, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["visual_tokens_range"], found["exports_as"]) == ([1, 7], "remote code")


def load_adapter(stage: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    return load_file(str(stage / "adapter" / "adapter_model.safetensors"))


def test_model_that_is_not_there_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    assert run_mllm(monkeypatch, "info", "no/such-model").startswith("error: no such model")
    assert run_mllm(monkeypatch, "info", "nowhere.yaml").startswith("error: no config file nowhere.yaml")
