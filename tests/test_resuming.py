"""What may be changed when a run goes on: how fast it learns, never what."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from mllm.config import dump_config, validate
from mllm.output import check_output
from mllm.resuming import check_changes

RUN: dict[str, Any] = {
    "model": {"vision_encoder": "owner/encoder", "llm": "owner/base", "connector": {"type": "mlp"}},
    "train": {"learning_rate": {"connector": 1e-3, "llm": 1e-4}, "lora": {"rank": 4}, "steps": 8},
}


def changed(folder: Path, name: str = "", value: Any = None) -> Any:
    """The config of a run in the folder, one setting another."""
    raw = yaml.safe_load(yaml.safe_dump(RUN))
    raw["train"]["output_dir"] = str(folder)
    *sections, key = name.split(".")
    place = raw
    for section in sections:
        place = place.setdefault(section, {})
    if key:
        place[key] = value
    return validate({**raw, "resume": True}, "test")


@pytest.fixture
def cut(tmp_path: Path) -> Path:
    """The folder of a run that was cut off behind its fourth step."""
    (tmp_path / "out/checkpoints/step-4").mkdir(parents=True)
    (tmp_path / "out/config.yaml").write_text(dump_config(changed(tmp_path / "out")))
    return tmp_path / "out"


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("model.llm", "owner/instruct", "model.llm was owner/base, is owner/instruct"),
        ("model.vision_encoder", ["owner/encoder", "owner/second"], "is [owner/encoder, owner/second]"),
        ("model.connector", {"type": "linear"}, "model.connector.type was mlp, is linear"),
        ("model.feature_layer", -3, "model.feature_layer was -2, is -3"),
        ("model.quantisation", "nf4", "model.quantisation was null, is nf4"),
        ("model.dtype", "bfloat16", "model.dtype was float32, is bfloat16"),
        ("train.lora", None, "train.lora was {"),
        ("train.lora.rank", 8, "train.lora.rank was 4, is 8"),
        ("train.lora.alpha", 64, "train.lora.alpha was"),
        ("train.optimizer", "muon", "train.optimizer was adamw, is muon"),
        ("train.learning_rate.connector", None, "train.learning_rate.connector was 0.001, is null"),
        ("train.learning_rate.vision_encoder", 1e-6, "train.learning_rate.vision_encoder was null, is 1.0e-06"),
        ("data.image_fit", "pad", "data.image_fit was native, is pad"),
        ("init_from", "earlier", "init_from was null, is earlier"),
    ],
)
def test_another_model_is_refused_by_the_name_of_the_setting(cut: Path, name: str, value: Any, told: str) -> None:
    before = (cut / "config.yaml").read_text()
    with pytest.raises(ValueError, match="those of another model") as error:
        check_output(changed(cut, name, value))
    assert told in str(error.value)
    assert (cut / "config.yaml").read_text() == before


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("train.learning_rate.llm", 1e-5, ["train.learning_rate.llm was 0.0001, is 1.0e-05"]),
        ("train.steps", 12, ["train.steps was 8, is 12"]),
        ("train.loss_reduction", "sample", ["train.loss_reduction was token, is sample"]),
        ("train.mixed_precision", "bf16", ["train.mixed_precision was 'no', is bf16"]),
        ("model.attention", "eager", []),
        ("train.rows_per_micro_batch", 4, []),
        ("data.num_workers", 0, []),
        ("", None, []),
    ],
)
def test_what_a_run_may_learn_otherwise_is_said(cut: Path, name: str, value: Any, told: list[str]) -> None:
    assert check_changes(changed(cut, name, value)) == told


def test_it_is_said_once_and_by_the_first_rank(cut: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    check_output(changed(cut, "train.steps", 12))
    assert capsys.readouterr().out == "resume: from here on with other settings: train.steps was 8, is 12\n"
    monkeypatch.setenv("RANK", "1")
    check_output(changed(cut, "train.steps", 12))
    assert not capsys.readouterr().out


def test_a_folder_that_was_moved_is_no_other_model(cut: Path, tmp_path: Path) -> None:
    before, now = tmp_path / "a/llm", tmp_path / "b/llm"
    now.mkdir(parents=True)
    (cut / "config.yaml").write_text(dump_config(changed(cut, "model.llm", str(before))))
    assert check_changes(changed(cut, "model.llm", str(now))) == [f"model.llm was {before}, is {now}"]
    before.mkdir(parents=True)  # still there: it is another one
    with pytest.raises(ValueError, match=r"model\.llm was"):
        check_changes(changed(cut, "model.llm", str(now)))


def test_before_the_first_checkpoint_anything_may_change(cut: Path) -> None:
    (cut / "checkpoints/step-4").rmdir()
    assert check_changes(changed(cut, "model.llm", "owner/instruct")) == []
