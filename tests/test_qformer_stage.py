"""The Q-Former's own stage through its script, and the align stage that starts from it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from conftest import picture
from test_recipes import in_process

QFORMER = {"type": "qformer", "num_queries": 5, "hidden_size": 32, "num_layers": 2, "num_heads": 2}

pytestmark = pytest.mark.recipe


def written(folder: Path, hub: Path, data: dict[str, Any] | None = None, **train: Any) -> Path:
    """The YAML of a run over eight pictures."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    records = []
    for row in range(8):
        picture(row).save(folder / "images" / f"{row}.png")
        records.append(json.dumps({"image": f"images/{row}.png", "caption": f"picture number {row}"}))
    (folder / "data.jsonl").write_text("\n".join(records))
    sources = [{"format": "captions", "path": str(folder / "data.jsonl")}]
    config = {
        "model": {"vision_encoder": str(hub / "encoder"), "llm": str(hub / "llm"), "connector": QFORMER},
        "data": {"sources": sources, "seq_length": 64, "packing": False, "num_workers": 0, **(data or {})},
        "train": {
            "output_dir": str(folder / "qformer"),
            "learning_rate": {"connector": 1e-3},
            "steps": 4,
            "rows_per_step": 4,
            "rows_per_micro_batch": 4,
            "loss_reduction": "sample",
            "audit": "quick",
            **train,
        },
    }
    (folder / "qformer.yaml").write_text(yaml.safe_dump(config))
    return folder / "qformer.yaml"


def test_align_starts_from_the_queries_and_says_that_the_heads_stay_behind(
    hub: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert in_process("qformer", "--config", written(tmp_path, hub, {"held_out": 2})) == 0, capsys.readouterr().err
    stage = tmp_path / "qformer"
    line = json.loads((stage / "metrics.jsonl").read_text().splitlines()[-1])
    assert {"itc", "itm", "itg", "held_out"} <= line.keys()
    assert line["loss"] == pytest.approx(line["itc"] + line["itm"] + line["itg"], rel=1e-5)
    assert "each image is compared with 4 texts" in capsys.readouterr().out
    learned, heads = load_file(stage / "connector.safetensors"), load_file(stage / "qformer_text.safetensors")
    assert not learned.keys() & heads.keys()
    assert json.loads((stage / "audit.json").read_text())["end"]["never_moved"] == []

    flags = ["--init_from", stage, "--train.output_dir", tmp_path / "align", "--train.learning_rate.connector", "0"]
    flags += ["--train.learning_rate.llm", "1e-4", "--train.steps", "1", "--data.packing", "true"]
    assert in_process("pretrain", "--config", tmp_path / "qformer.yaml", *flags) == 0, capsys.readouterr().err
    said = capsys.readouterr().out
    assert "starting from" in said
    assert "qformer_text.safetensors: left behind" in said
    taken = load_file(tmp_path / "align" / "connector.safetensors")  # frozen there, so as it was taken over
    assert taken.keys() == learned.keys()
    assert all(torch.equal(taken[name], tensor) for name, tensor in learned.items())


def test_stage_that_was_cut_off_resumes_to_the_same_losses(hub: Path, tmp_path: Path) -> None:
    config = written(tmp_path, hub, save_every=2)
    assert in_process("qformer", "--config", config) == 0
    stage = tmp_path / "qformer"
    before, heads = (stage / "metrics.jsonl").read_text(), load_file(stage / "qformer_text.safetensors")
    (stage / "connector.safetensors").unlink()
    for file in (stage / "checkpoints" / "step-4").iterdir():
        file.unlink()
    (stage / "checkpoints" / "step-4").rmdir()
    assert in_process("qformer", "--config", config, "--resume") == 0
    told = [
        [json.loads(line)["itc"] for line in text.splitlines()]
        for text in (before, (stage / "metrics.jsonl").read_text())
    ]
    assert told[0] == told[1]
    again = load_file(stage / "qformer_text.safetensors")
    assert all(torch.equal(again[name], tensor) for name, tensor in heads.items())
    assert in_process("qformer", "--config", config, "--overwrite", "--dry_run") == 0


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--data.packing", "true"], "data.packing: pairs are compared row by row"),
        (["--train.loss_reduction", "token"], "set it to sample"),
        (["--train.learning_rate.llm", "1e-4"], "only the Q-Former learns here"),
        (["--train.rows_per_micro_batch", "1"], "a pair is compared with others"),
        (["--data.seq_length", "512"], "set it to at most 132"),
        (["--model.connector.type", "mlp"], "this stage teaches a qformer"),
    ],
)
def test_setting_that_means_nothing_here_is_refused_in_words(
    hub: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], words: str
) -> None:
    path = written(tmp_path, hub)
    if flags[-1] == "mlp":
        config = yaml.safe_load(path.read_text())
        config["model"]["connector"] = {"type": "mlp"}
        path.write_text(yaml.safe_dump(config))
        flags = []
    assert in_process("qformer", "--config", path, *flags) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "qformer").exists()


def test_samples_without_one_image_are_counted_and_refused(
    hub: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = written(tmp_path, hub)
    (tmp_path / "texts.json").write_text(
        json.dumps(
            [{"id": "t", "conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]}]
        )
    )
    config = yaml.safe_load(path.read_text())
    config["data"]["sources"].append({"format": "llava", "path": str(tmp_path / "texts.json")})
    path.write_text(yaml.safe_dump(config))
    assert in_process("qformer", "--config", path) == 2
    assert "1 of 9 samples have no image or several" in capsys.readouterr().err
