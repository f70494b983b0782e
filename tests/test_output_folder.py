"""What a run does with a folder that is used: it refuses, goes on or starts again, and a dry run writes nothing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from conftest import write_llava
from mllm.data.formats.llava import LlavaSource
from mllm.generate import Assistant
from recipe_runs import in_process, lines, write_config

pytestmark = pytest.mark.recipe


@pytest.fixture(scope="module")
def finished(hub: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The data of a run, and `align/`, which it left."""
    folder = tmp_path_factory.mktemp("finished")
    config = write_config(folder, hub, write_llava(folder), "align", save_every=2, steps=4)
    assert in_process("pretrain", "--config", config) == 0
    return folder


@pytest.fixture
def used(finished: Path, hub: Path, tmp_path: Path) -> Path:
    """The YAML of a stage whose output folder holds a run, and a file of the user's."""
    shutil.copytree(finished / "align", tmp_path / "align")
    (tmp_path / "align" / "notes.txt").write_text("mine")
    return write_config(tmp_path, hub, finished / "data.json", "align", save_every=2, steps=4)


def test_used_output_folder_is_refused_with_one_line_and_left_alone(used: Path, capsys: Any) -> None:
    before = {path: path.stat().st_mtime_ns for path in (used.parent / "align").rglob("*")}
    capsys.readouterr()
    assert in_process("pretrain", "--config", used) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    assert "--resume" in said
    assert "--overwrite" in said
    assert {path: path.stat().st_mtime_ns for path in (used.parent / "align").rglob("*")} == before


def test_overwrite_starts_again_and_spares_foreign_files(used: Path) -> None:
    before = lines(used.parent / "align")
    assert in_process("pretrain", "--config", used, "--overwrite") == 0
    assert (used.parent / "align" / "notes.txt").read_text() == "mine"
    assert [line["loss"] for line in lines(used.parent / "align")] == [line["loss"] for line in before]


def test_resume_goes_on_to_the_same_losses(used: Path) -> None:
    before = lines(used.parent / "align")
    shutil.rmtree(used.parent / "align" / "checkpoints" / "step-4")
    (used.parent / "align" / "connector.safetensors").unlink()
    assert in_process("pretrain", "--config", used, "--resume") == 0
    assert [line["loss"] for line in lines(used.parent / "align")] == [line["loss"] for line in before]
    Assistant.load(used.parent / "align")


def test_resume_and_overwrite_together_are_refused(used: Path, capsys: Any) -> None:
    assert in_process("pretrain", "--config", used, "--resume", "--overwrite") == 2
    assert "give one of them" in capsys.readouterr().err


def test_resume_where_nothing_is_saved_yet_starts_from_the_first_step_and_says_so(
    hub: Path, tmp_path: Path, capsys: Any
) -> None:
    """The same command line from the first start on: a job may be killed before its first checkpoint."""
    config = write_config(tmp_path, hub, write_llava(tmp_path), "align", save_every=2)
    assert in_process("pretrain", "--config", config, "--resume") == 0
    assert "nothing saved yet, from step 0" in capsys.readouterr().out
    first = lines(tmp_path / "align")
    shutil.rmtree(tmp_path / "align" / "checkpoints")
    (tmp_path / "align" / "connector.safetensors").unlink()  # as if it had been killed in its first steps
    assert in_process("pretrain", "--config", config, "--resume") == 0
    assert "nothing saved yet, from step 0" in capsys.readouterr().out
    assert [line["loss"] for line in lines(tmp_path / "align")] == [line["loss"] for line in first]


def test_resume_of_a_finished_run_says_so_and_changes_nothing(used: Path, capsys: Any) -> None:
    before = {path: path.stat().st_mtime_ns for path in (used.parent / "align").rglob("*")}
    assert in_process("pretrain", "--config", used, "--resume") == 0
    assert "is finished already" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in (used.parent / "align").rglob("*")} == before


def test_finished_run_is_made_longer_from_its_newest_checkpoint(used: Path, capsys: Any) -> None:
    before = lines(used.parent / "align")
    assert in_process("pretrain", "--config", used, "--resume", "--train.steps", 6) == 0
    assert "going on from" in capsys.readouterr().out
    assert lines(used.parent / "align")[:4] == before
    assert [line["step"] for line in lines(used.parent / "align")] == [1, 2, 3, 4, 5, 6]
    shutil.rmtree(used.parent / "align" / "checkpoints")
    assert in_process("pretrain", "--config", used, "--resume", "--train.steps", 8) == 2
    assert "nothing to resume" in capsys.readouterr().err
    Assistant.load(used.parent / "align")


def test_run_that_shall_be_shorter_than_its_checkpoints_is_refused_and_left_as_it_was(used: Path, capsys: Any) -> None:
    before = {path: path.stat().st_mtime_ns for path in (used.parent / "align").rglob("*")}
    assert in_process("pretrain", "--config", used, "--resume", "--train.steps", 3) == 2
    assert "step-4 has 4 steps behind it, and the run shall have 3" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in (used.parent / "align").rglob("*")} == before


def test_resume_with_no_whole_checkpoint_is_an_error_that_names_each(used: Path, capsys: Any) -> None:
    (used.parent / "align" / "connector.safetensors").unlink()
    for step in (2, 4):
        (used.parent / "align" / "checkpoints" / f"step-{step}" / "optimizer.pt").write_bytes(b"")
    assert in_process("pretrain", "--config", used, "--resume") == 2
    said = capsys.readouterr().err
    assert "step-2: optimizer.pt has 0 bytes" in said
    assert "step-4: optimizer.pt has 0 bytes" in said
    assert len(lines(used.parent / "align")) == 4


def test_output_folder_that_is_a_file_is_refused(hub: Path, tmp_path: Path, capsys: Any) -> None:
    config = write_config(tmp_path, hub, write_llava(tmp_path), "align")
    (tmp_path / "align").write_text("a file")
    assert in_process("pretrain", "--config", config) == 2
    assert "is a file" in capsys.readouterr().err


def test_output_folder_that_may_not_be_written_is_one_line(hub: Path, tmp_path: Path, capsys: Any) -> None:
    config = write_config(tmp_path, hub, write_llava(tmp_path), "align")
    (tmp_path / "file").touch()
    assert in_process("pretrain", "--config", config, "--train.output_dir", tmp_path / "file/align") == 2
    assert "error: train.output_dir: " in capsys.readouterr().err


def test_stage_may_not_overwrite_the_one_it_starts_from(used: Path, capsys: Any) -> None:
    folder = used.parent / "align"
    flags = ["--init_from", folder, "--train.output_dir", folder, "--overwrite"]
    assert in_process("finetune", "--config", used, *flags) == 2
    assert "init_from" in capsys.readouterr().err
    Assistant.load(folder)


def test_dry_run_writes_nothing(hub: Path, tmp_path: Path, capsys: Any) -> None:
    config = write_config(tmp_path, hub, write_llava(tmp_path), "align")
    before = sorted(tmp_path.rglob("*"))
    assert in_process("pretrain", "--config", config, "--dry_run") == 0
    told = capsys.readouterr().out
    assert "what trains" in told
    assert told.count("exports as LlavaForConditionalGeneration: its connector is Llava's\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_dry_run_tells_memory_time_and_disk_also_as_json(hub: Path, tmp_path: Path, capsys: Any) -> None:
    config = write_config(tmp_path, hub, write_llava(tmp_path), "align", save_every=1)
    assert in_process("pretrain", "--config", config, "--dry_run", "--json", tmp_path / "told.json") == 0
    text = capsys.readouterr().out
    for words in ("largest micro-batch", "a rank at the peak", "tokens/s", "activations", "checkpoints of"):
        assert words in text
    told = json.loads((tmp_path / "told.json").read_text())
    assert told["memory_per_rank"]["peak"] == sum(told["memory_per_rank"]["parts"].values())
    assert told["parts"]["connector"]["trained"] > 0 == told["parts"]["llm"]["trained"]
    assert (told["steps"], told["visual_tokens_per_image"], told["fits"]) == (3, 4, True)
    assert told["eta_seconds"] == pytest.approx(3 * told["seconds_per_step"])
    assert not (tmp_path / "align").exists()


def test_json_that_cannot_be_written_is_told_before_the_work(hub: Path, tmp_path: Path, capsys: Any) -> None:
    config = write_config(tmp_path, hub, write_llava(tmp_path), "align")
    assert in_process("pretrain", "--config", config, "--dry_run", "--json", tmp_path) == 2
    assert f"error: --json {tmp_path} is a folder" in capsys.readouterr().err


def test_dry_run_indexes_for_the_run_that_follows(hub: Path, tmp_path: Path, monkeypatch: Any) -> None:
    config = write_config(tmp_path, hub, write_llava(tmp_path), "align")
    flags = ["--config", config, "--data.index_dir", tmp_path / "counts"]
    assert in_process("pretrain", *flags, "--dry_run") == 0
    (counts,) = (tmp_path / "counts").iterdir()
    monkeypatch.setattr(LlavaSource, "scan", None)  # nobody may go through the file again
    assert in_process("pretrain", *flags) == 0
    assert list((tmp_path / "counts").iterdir()) == [counts]
