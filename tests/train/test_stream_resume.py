"""A run on a stream that was stopped at any step goes on with the losses of one that was not."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from accelerate import Accelerator

from conftest import make_processor, write_llava
from mllm.data.formats.llava import LlavaSource
from mllm.data.loader import DataConfig
from mllm.data.streams.batches import open_stream
from mllm.train.checkpoint import checkpoints
from mllm.train.loop import fit
from mllm.train.route import make_plan, num_steps
from mllm.train.settings import TrainConfig
from runs import SEQ_LENGTH, chosen_model, metrics, settings

STEPS = 9


def spoiled(folder: Path) -> Path:
    """24 conversations; row 3 is no conversation, row 5 lacks its placeholder, the image of row 8 is broken."""
    path = write_llava(folder, 24)
    records = json.loads(path.read_text())
    del records[3]["conversations"]
    records[5]["conversations"][0]["value"] = "no placeholder"
    (folder / "images" / "8.png").write_bytes(b"broken")
    path.write_text(json.dumps(records))
    return path


def stream(path: Path, train: TrainConfig, resume: bool = False, **changes: Any) -> None:
    """Like `runs.run`, without an index."""
    plain = {"num_workers": 0, "max_bad_share": 0.5}
    data = DataConfig([LlavaSource(path=path)], seq_length=SEQ_LENGTH, stream=True, **{**plain, **changes})
    processor = make_processor()
    source = open_stream(data, processor, train.seed)
    plan = make_plan(source, data, train, resume)
    train.output_dir.mkdir(parents=True, exist_ok=True)
    fit(Accelerator(cpu=True), chosen_model(train), processor, source, plan, data, train, resume)


def cut_off(whole: Path, folder: Path, step: int) -> TrainConfig:
    """The run as it was when it died after that step, before the next checkpoint."""
    shutil.copytree(whole, folder)
    for path in checkpoints(folder):
        if path.name != f"step-{step}":
            shutil.rmtree(path)
    return settings(folder, steps=STEPS, save_every=1)


def written(folder: Path, name: str) -> list[Any]:
    return sorted((folder / name).read_text().splitlines())


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stop_at_any_step_changes_no_loss_and_no_count(tmp_path: Path, workers: int) -> None:
    data, whole = spoiled(tmp_path), settings(tmp_path / "whole", steps=STEPS, save_every=1, keep_last=STEPS)
    stream(data, whole, num_workers=workers)
    losses = metrics(whole.output_dir, "step", "loss", "samples", "tokens", "skipped")
    assert len(losses) == STEPS
    for stop in (1, 4, 8):
        train = cut_off(whole.output_dir, tmp_path / f"cut-{stop}", stop)
        assert [path.name for path in checkpoints(train.output_dir)][-1] == f"step-{stop}"
        stream(data, train, resume=True, num_workers=2 - workers)
        assert metrics(train.output_dir, "step", "loss", "samples", "tokens", "skipped") == losses
        for name in ("ledger.json", "quarantine.jsonl"):
            assert written(train.output_dir, name) == written(whole.output_dir, name)


def test_bad_samples_of_a_stream_are_named_once_and_counted_each_time(tmp_path: Path) -> None:
    data, train = spoiled(tmp_path), settings(tmp_path / "out", steps=STEPS)
    stream(data, train)  # 36 rows of one or two samples: more than one pass
    lines = [json.loads(line) for line in (train.output_dir / "quarantine.jsonl").read_text().splitlines()]
    told = {(line["where"].rpartition(" ")[2], line["kind"], line["step"] is None) for line in lines}
    assert told == {("3", "record", True), ("5", "record", True), ("8", "image", False)}
    assert len(lines) == 3
    ledger = json.loads((train.output_dir / "ledger.json").read_text())
    samples = sum(number for (number,) in metrics(train.output_dir, "samples"))
    assert ledger["skipped"]["record"] >= 4
    assert ledger["skipped"]["image"] >= 2
    assert ledger["used"] == samples - ledger["skipped"]["image"]
    assert ledger["read"] == ledger["used"] + sum(ledger["skipped"].values()) + ledger["waiting"]


def test_resume_on_other_files_is_refused(tmp_path: Path) -> None:
    stream(write_llava(tmp_path, 12), settings(tmp_path / "out", steps=2, save_every=2))
    with pytest.raises(ValueError, match="was made with other data"):
        stream(write_llava(tmp_path, 13), settings(tmp_path / "out", steps=4), resume=True)


def test_without_steps_a_stream_is_refused(tmp_path: Path) -> None:
    train = settings(tmp_path / "out", steps=None)
    data = DataConfig([LlavaSource(path=write_llava(tmp_path))], seq_length=SEQ_LENGTH, stream=True)
    plan = make_plan(open_stream(data, make_processor(), 0), data, train)
    with pytest.raises(ValueError, match=r"set train\.steps"):
        num_steps(plan, train)
