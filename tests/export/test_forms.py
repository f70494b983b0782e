"""The merged stage folder and the adapter with its base say what the trained model says."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from mllm import cli
from mllm.config import load_config
from mllm.export import environments, export
from mllm.export.environments import HERE, Environment
from mllm.generate import Assistant
from mllm.train.tuning.adapters import Lora
from stages import make_parts, make_stage

OLD = os.environ.get("MLLM_TRANSFORMERS_4_57", "/nowhere")
"""A folder of packages with transformers 4.57, as for `test_transformers.py`."""


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("parts")
    make_parts(folder, "clip", "qwen2")
    return make_stage(folder, lora=True)


def test_merged_stage_has_no_adapter_and_gives_the_same_answer(stage: Path, tmp_path: Path) -> None:
    exported = export(str(stage), tmp_path / "out", "merged")
    assert [proof.faults for proof in exported.proofs] == [()]
    assert (stage / "adapter").is_dir()
    assert not (tmp_path / "out" / "adapter").exists()
    question = cli.question([], "what is it?", [])
    assert Assistant.load(tmp_path / "out").answer([question], 8) == Assistant.load(stage).answer([question], 8)


def test_merged_stage_in_bfloat16_says_so_in_its_config(stage: Path, tmp_path: Path) -> None:
    export(str(stage), tmp_path / "out", "merged", "bfloat16")
    assert load_config(tmp_path / "out" / "config.yaml").parts().dtype == "bfloat16"
    kinds = {str(tensor.dtype) for tensor in load_file(str(tmp_path / "out" / "llm.safetensors")).values()}
    assert kinds == {"torch.bfloat16"}


KINDS = {"lora": Lora(rank=4, alpha=8), "dora": Lora(rank=4, dora=True), "rslora": Lora(rank=4, rslora=True)}


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
def test_adapter_on_its_base_is_the_trained_model_in_fresh_processes(
    stage: Path, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under transformers 4.57 too, where `make test-export` has it."""
    chosen = [HERE, *([Environment("transformers 4.57", sys.executable, (OLD,))] if Path(OLD).is_dir() else [])]
    monkeypatch.setattr(environments, "choose", lambda _named: (chosen, ""))
    trained = make_stage(stage.parent, lora=KINDS[kind], out=tmp_path / "stage")
    exported = export(str(trained), tmp_path / "out", "adapter", "bfloat16")
    assert [proof.faults for proof in exported.proofs] == [()] * len(chosen)
    assert any("no DoRA" in note for note in exported.notes) == (kind == "dora")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["modules_to_save"] is None
    assert config["target_modules"].startswith(r".*language_model\.")
    names = load_file(str(tmp_path / "out" / "adapter_model.safetensors"))
    assert all(name.startswith("base_model.model.model.language_model.layers.") for name in names)
    assert (tmp_path / "out" / "base" / "model.safetensors").is_file()


def test_stage_without_an_adapter_is_told_what_to_do(tmp_path: Path) -> None:
    make_parts(tmp_path)
    with pytest.raises(ValueError, match="has no adapter"):
        export(str(make_stage(tmp_path)), tmp_path / "out", "adapter")
