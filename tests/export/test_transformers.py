"""An exported folder says what the trained model says, in stock classes, in a process that cannot import mllm."""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from conftest import run_mllm
from data.families import FAMILIES
from mllm.data.loader import DataConfig
from mllm.export import environments, export, reload
from mllm.export.environments import HERE, Environment
from mllm.export.llava import extended
from mllm.export.proof import judge, prove, write_reference
from mllm.export.trained import Trained, load
from mllm.export.transformers_folder import write_files
from mllm.models.connectors import (
    AvgPoolConnector,
    CAbstractorConnector,
    LinearConnector,
    MLPConnector,
    PixelShuffleConnector,
    QFormerConnector,
    ResamplerConnector,
)
from stages import make_parts, make_stage

OLD = os.environ.get("MLLM_TRANSFORMERS_4_57", "")
"""A folder of packages with transformers 4.57 (`make test-export` makes one), or a Python that has it."""
needs_old = pytest.mark.skipif(
    not OLD, reason="no transformers 4.57: `make test-export` installs it and sets MLLM_TRANSFORMERS_4_57"
)
LLAVA = {
    "clip-llama": ({}, {}),
    "siglip-qwen2-tied-lora": ({"encoder": "siglip", "llm": "qwen2"}, {"lora": True}),
    "vit-qwen3": ({"encoder": "vit", "llm": "qwen3"}, {}),
    "dinov2-last-layer": ({"encoder": "dinov2"}, {"feature_layer": -1}),
    "clip-two-layers": ({}, {"feature_layer": [-2, 1]}),
    "clip-neox": ({"llm": "gpt_neox"}, {}),
    "linear-wide-llm": ({"hidden_size": 64, "head_dim": 16}, {"connector": LinearConnector()}),
    "linear-narrow-llm": ({}, {"connector": LinearConnector()}),
    "siglip-padded": ({"encoder": "siglip"}, {"image_fit": "pad"}),
    "clip-padded": ({}, {"image_fit": "pad"}),
    "no-row-for-the-image": ({"vocab_size": 303, "llm": "qwen2"}, {}),
    "space-before-words": ({"prefix_space": True}, {}),
    "tokenizer-with-bos": ({"bos": True}, {}),
    "chatml": ({"template": FAMILIES["qwen2"].template}, {}),
    "thinking": ({"template": FAMILIES["qwen3"].template}, {}),
}
"""Parts and stage settings that stock Llava holds."""

ANYRES = {"data": DataConfig(tiles="anyres")}
SIX = {"data": DataConfig(tiles="anyres", max_tiles=6)}
NEXT = {
    "clip-tiles": ({}, ANYRES),
    "siglip-six-tiles-lora": ({"encoder": "siglip", "llm": "qwen2"}, {"lora": True, **SIX}),
    "dinov2-linear-tiles": ({"encoder": "dinov2"}, {"connector": LinearConnector(), **ANYRES}),
    "two-layers-tiles": ({}, {"feature_layer": [-2, 1], **ANYRES}),
}
"""Llava's over tiles."""
VIP = {"vip-two-layers-norm": ({"llm": "qwen2"}, {"feature_layer": [-2, -3], "connector": MLPConnector(norm=True)})}
DEEPSEEK = {
    "mlp-behind-the-norm": ({"encoder": "siglip"}, {"feature_norm": True}),
    "mlp-behind-the-norm-last-layer-lora": (
        {"encoder": "siglip", "llm": "qwen2"},
        {"feature_norm": True, "feature_layer": -1, "lora": True, "image_fit": "pad"},
    ),
}
FINE = {"encoder": "siglip_fine"}
COHERE2 = {
    "one-matrix": (FINE, {"feature_norm": True, "connector": PixelShuffleConnector(depth=1)}),
    "swiglu": (
        {**FINE, "llm": "qwen3"},
        {"feature_norm": True, "connector": PixelShuffleConnector(activation="swiglu"), "image_fit": "pad"},
    ),
    "pooled": ({**FINE, "llm": "qwen2"}, {"feature_norm": True, "connector": AvgPoolConnector(tokens=4, depth=1)}),
    "linear-behind-the-norm": (FINE, {"feature_norm": True, "connector": LinearConnector()}),
    "neox": (
        {**FINE, "llm": "gpt_neox"},
        {"feature_norm": True, "connector": PixelShuffleConnector(factor=4, depth=1)},
    ),
}
AYA = {
    "normed-swiglu": (FINE, {"connector": PixelShuffleConnector(norm=True, activation="swiglu")}),
    "normed-one-matrix-clip": ({"llm": "qwen2"}, {"connector": PixelShuffleConnector(norm=True, depth=1)}),
    "normed-swiglu-dinov2": (
        {"encoder": "dinov2", "llm": "qwen3"},
        {"feature_layer": -1, "lora": True, "connector": PixelShuffleConnector(norm=True, activation="swiglu")},
    ),
}
REMOTE = {
    "clip-behind-the-norm": ({}, {"feature_norm": True}),
    "dinov2-behind-the-norm-two-layers": ({"encoder": "dinov2"}, {"feature_norm": True, "feature_layer": [1, -1]}),
    "siglip-norm-in-front": ({"encoder": "siglip"}, {"connector": MLPConnector(norm=True)}),
    "mlp-of-three": ({}, {"connector": MLPConnector(depth=3)}),
    "pixel-shuffle": ({"llm": "qwen2"}, {"connector": PixelShuffleConnector()}),
    "qformer": ({}, {"connector": QFormerConnector(num_queries=3, hidden_size=16, num_layers=2, num_heads=2)}),
    "avg-pool": ({"encoder": "siglip"}, {"connector": AvgPoolConnector(tokens=1)}),
    "resampler": ({}, {"connector": ResamplerConnector(num_queries=3, hidden_size=16, num_layers=1, num_heads=2)}),
    "c-abstractor": ({}, {"connector": CAbstractorConnector(tokens=1, hidden_size=16, depth=1)}),
    "registers": ({"encoder": "registers"}, {}),
    "gemma2": ({"llm": "gemma2"}, {"attention": "eager"}),
    "pooled-tiles": ({"encoder": "siglip"}, {"connector": AvgPoolConnector(tokens=1), **ANYRES}),
    "shuffled-tiles-gemma2": ({"llm": "gemma2"}, {"attention": "eager", "connector": PixelShuffleConnector(), **SIX}),
}
"""Parts and stage settings that no stock class holds."""
HOMES = {
    "LlavaForConditionalGeneration": LLAVA,
    "LlavaNextForConditionalGeneration": NEXT,
    "VipLlavaForConditionalGeneration": VIP,
    "DeepseekVLForConditionalGeneration": DEEPSEEK,
    "Cohere2VisionForConditionalGeneration": COHERE2,
    "AyaVisionForConditionalGeneration": AYA,
    "MllmForConditionalGeneration": REMOTE,
}
FAST = (
    "siglip-qwen2-tied-lora",
    "no-row-for-the-image",
    "tokenizer-with-bos",
    "thinking",
    "siglip-six-tiles-lora",
    "pooled-tiles",
    "vip-two-layers-norm",
    "mlp-behind-the-norm-last-layer-lora",
    "pooled",
    "normed-swiglu",
    "qformer",
    "clip-behind-the-norm",
    "registers",
)
"""The cells of every day; `make test-export` walks through all of them, under both versions."""
CELLS = [(architecture, name) for architecture, cells in HOMES.items() for name in cells]


def made(folder: Path, parts: dict[str, Any], stage: dict[str, Any]) -> Path:
    make_parts(folder, **parts)
    return make_stage(folder, **stage)


def old_environment() -> Environment:
    if Path(OLD).is_dir():
        return Environment("transformers 4.57", sys.executable, (OLD,))
    return Environment("transformers 4.57", OLD)


def written(folder: Path, architecture: str, name: str) -> tuple[Trained, Path]:
    """The model of a cell, and the folder that was made of it, of a name of its own (remote code is cached by it)."""
    trained, out = load(str(made(folder, *HOMES[architecture][name]))), folder / f"out_{name.replace('-', '_')}"
    home = write_files(trained, out, torch.float32)
    assert (home.architecture or "MllmForConditionalGeneration") == architecture, home.why
    return trained, out


@pytest.mark.parametrize(
    ("architecture", "name"), [pytest.param(*cell, marks=[] if cell[1] in FAST else pytest.mark.long) for cell in CELLS]
)
def test_exported_folder_says_what_the_trained_model_says(
    architecture: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # this process has imported mllm, whose own classes would be taken for those in the folder
    monkeypatch.delitem(CONFIG_MAPPING._extra_content, "mllm", raising=False)
    trained, out = written(tmp_path, architecture, name)
    write_reference(trained, tmp_path, torch.float32)
    found = reload.compare(str(out), str(tmp_path))
    found["mllm"] = False
    proof = judge(HERE, found)
    assert proof.faults == ()
    assert proof.samples == 3
    assert found["class"] == architecture
    assert found["module"].startswith(("transformers.models.", "transformers_modules."))
    answers = [sample["answer"] for sample in found["samples"]]
    assert any(answers), "silence is no answer to compare"


@pytest.mark.long
def test_two_encoders_that_normalise_differently_are_exported_as_they_are(tmp_path: Path) -> None:
    make_parts(tmp_path / "one", "clip")
    make_parts(tmp_path / "other", "siglip")
    encoders = [str(tmp_path / name / "encoder") for name in ("one", "other")]
    trained = load(str(make_stage(tmp_path / "one", vision_encoder=encoders)))
    assert trained.takes_bytes
    write_files(trained, tmp_path / "out_fused", torch.float32)
    environments = [HERE, *([old_environment()] if OLD else [])]
    for proof in prove(trained, tmp_path / "out_fused", environments, torch.float32):
        assert proof.faults == ()


@needs_old
@pytest.mark.long
@pytest.mark.parametrize(("architecture", "name"), CELLS)
def test_transformers_4_57_says_it_too(architecture: str, name: str, tmp_path: Path) -> None:
    trained, out = written(tmp_path, architecture, name)
    (proof,) = prove(trained, out, [old_environment()], torch.float32)
    assert proof.faults == ()
    assert proof.transformers.startswith("4.57")


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made(tmp_path_factory.mktemp("parts"), {"encoder": "siglip", "llm": "qwen2"}, {"lora": True})


def test_command_proves_the_folder_in_a_fresh_process(
    stage: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    assert (
        run_mllm(monkeypatch, "export", stage, "--out", "out", "--dtype", "bfloat16") == 0
    )  # a relative path, as people give them
    told = capsys.readouterr().out
    assert "LlavaForConditionalGeneration" in told
    assert "proven: transformers 5" in told
    assert "not checked under transformers 4.57.6 (offline)" in told
    report = json.loads((tmp_path / "out" / "export.json").read_text())
    assert [proof["faults"] for proof in report["proofs"]] == [[]]
    weights = load_file(str(tmp_path / "out" / "model.safetensors"))
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    assert not list(tmp_path.glob("*.partial"))
    # a second time the folder is used
    assert "not empty: --overwrite replaces it" in run_mllm(monkeypatch, "export", stage, "--out", tmp_path / "out")


def test_folder_that_says_something_else_is_refused(
    stage: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mllm.export.llava.select_strategy", lambda trained: "default")  # SigLIP has no class token
    ended = run_mllm(monkeypatch, "export", stage, "--out", tmp_path / "out")
    assert ended.startswith("error: not exported: transformers 5")
    assert not (tmp_path / "out").exists()
    report = json.loads((tmp_path / "out.refused" / "export.json").read_text())
    assert report["proofs"][0]["faults"]


@pytest.mark.parametrize(
    ("damage", "fault"),
    [("multi_modal_projector.linear_2.bias", "logits differ"), ("vision_tower.vision_model.encoder", "missing keys")],
)
def test_proof_notices_a_wrong_and_a_missing_weight(stage: Path, tmp_path: Path, damage: str, fault: str) -> None:
    from safetensors.torch import save_file

    trained, out = load(str(stage)), tmp_path / "out"
    write_files(trained, out, torch.float32)
    weights = load_file(str(out / "model.safetensors"))
    hit = {name: tensor for name, tensor in weights.items() if name.startswith(damage)}
    for name, tensor in hit.items():
        if fault == "missing keys":
            del weights[name]
        else:
            weights[name] = tensor + 1e-3
    save_file(weights, str(out / "model.safetensors"), {"format": "pt"})
    write_reference(trained, tmp_path, torch.float32)
    found = reload.compare(str(out), str(tmp_path))
    assert any(fault in told for told in judge(HERE, {**found, "mllm": False}).faults)


def test_names_are_those_of_published_checkpoints(stage: Path, tmp_path: Path) -> None:
    trained = load(str(stage))
    write_files(trained, tmp_path, torch.float32)
    names = set(load_file(str(tmp_path / "model.safetensors")))
    assert "vision_tower.vision_model.encoder.layers.2.mlp.fc1.weight" in names, "the layer behind the tap is there too"
    assert "language_model.model.layers.0.self_attn.q_proj.weight" in names
    assert "language_model.lm_head.weight" not in names, "tied: the embeddings are the head"
    assert not [name for name in names if "vision_model.head" in name or "lora" in name]
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["text_config"]["architectures"] == ["Qwen2ForCausalLM"]
    assert config["text_config"]["rope_theta"] == config["text_config"]["rope_parameters"]["rope_theta"] == 5e5
    assert config["vision_config"]["vision_use_head"] is False
    assert config["vision_feature_select_strategy"] == "full"
    tokenizer = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert tokenizer["tokenizer_class"] == "PreTrainedTokenizerFast"
    images = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert images["crop_size"] == {"height": 28, "width": 28}
    assert not images["do_center_crop"]
    from transformers import AutoProcessor

    # what vLLM's and SGLang's Transformers backends ask before they see an image
    counted = AutoProcessor.from_pretrained(tmp_path)._get_num_multimodal_tokens(image_sizes=[(50, 60), (9, 9)])
    assert counted["num_image_tokens"] == [4, 4]


def test_new_row_of_the_head_never_wins() -> None:
    table = torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
    logits = torch.randn(1000, 8, generator=torch.Generator().manual_seed(1)) @ extended(table, 51).T
    assert not (logits.argmax(1) == 50).any()


@pytest.mark.long
def test_remote_code_imports_nothing_of_ours_and_answers_in_a_fresh_process(tmp_path: Path) -> None:
    connector = QFormerConnector(num_queries=3, hidden_size=16, num_layers=2, num_heads=2)
    exported = export(str(made(tmp_path, {}, {"connector": connector})), tmp_path / "out")
    assert exported.architecture == "MllmForConditionalGeneration"
    assert "QFormer" in exported.why
    assert any("trust_remote_code" in note for note in exported.notes)
    files = list((tmp_path / "out").glob("*.py"))
    assert {"configuration_mllm.py", "modeling_mllm.py", "mllm_qformer.py"} <= {file.name for file in files}
    for file in files:
        assert not re.search(r"^\s*(from|import) (mllm|pydantic)\b", file.read_text(), re.MULTILINE), file.name


def test_python_that_is_not_there_is_a_mistake_told_in_words(stage: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--check-with /nowhere/python"):
        export(str(stage), tmp_path / "out", check_with=["/nowhere/python"])


def test_offline_and_without_the_old_version_that_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    chosen, note = environments.choose([])
    assert chosen == [HERE]
    assert "--check-with 4.57.6" in note


def test_connector_that_reads_the_words_is_refused_in_words(tmp_path: Path) -> None:
    connector = QFormerConnector(num_queries=3, hidden_size=16, num_layers=2, num_heads=2, instruct=True)
    trained = load(str(made(tmp_path, {}, {"connector": connector})))
    with pytest.raises(ValueError, match="hand a connector no words"):
        write_files(trained, tmp_path / "out", torch.float32)
