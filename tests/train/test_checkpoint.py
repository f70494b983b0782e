"""What is written can be gone on from: the same losses after a cut, and nothing spoilt is taken for whole."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import write_llava
from mllm.data.planning import windows
from mllm.train.checkpoint import checkpoints, load_optimizer, load_weights, newest, save_checkpoint
from mllm.train.saving import durable
from mllm.train.saving.durable import damage
from mllm.train.saving.retention import metric
from mllm.train.trainable import LearningRates, Lora, parameter_groups
from runs import FULL, LORA, chosen_model, metrics, run, settings, weights

DROPOUT = {**LORA, "lora": Lora(rank=4, alpha=8, dropout=0.3)}


# ---------------------------------------------------------------- resume


WHAT: dict[str, dict[str, Any]] = {
    "connector": {},
    "lora": LORA,
    "lora with dropout": DROPOUT,
    "all": FULL,
    "kept features": {"feature_cache": 1.0},
    "muon": {"optimizer": "muon"},
}


@pytest.mark.parametrize("more", WHAT.values(), ids=WHAT)
def test_resume_continues_the_same_losses_bit_for_bit(tmp_path: Path, more: dict[str, Any]) -> None:
    data = write_llava(tmp_path, records=20)
    whole, cut = (settings(tmp_path / name, steps=8, save_every=3, **more) for name in ("whole", "cut"))
    torch.manual_seed(0)
    uninterrupted = weights(run(data, whole))
    shutil.copytree(whole.output_dir, cut.output_dir)
    shutil.rmtree(cut.output_dir / "checkpoints" / "step-6")  # as if the run had died between steps 3 and 6
    torch.manual_seed(1234)
    resumed = weights(run(data, cut, resume=True))
    assert metrics(cut.output_dir) == metrics(whole.output_dir)
    assert [line[0] for line in metrics(cut.output_dir)] == list(range(1, 9))
    assert all(torch.equal(uninterrupted[name], resumed[name]) for name in uninterrupted)


def test_resume_plans_nothing_of_what_is_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At nine tenths of an epoch of many windows, only the window that is going on is packed."""
    monkeypatch.setattr(windows, "WINDOW", 4)
    data, train = (
        write_llava(tmp_path, records=80),
        settings(tmp_path / "out", steps=18, save_every=18, rows_per_step=2),
    )
    run(data, train)
    state = checkpoints(train.output_dir)[-1] / "state.json"
    assert state.stat().st_size < 1000
    packed: list[tuple[int, int]] = []
    samples = windows.Windows.samples
    monkeypatch.setattr(windows.Windows, "samples", lambda self, *at: packed.append(at) or samples(self, *at))
    train.steps = 19
    run(data, train, resume=True)
    assert len(set(packed)) <= 3  # of twenty


def test_resume_of_a_run_that_was_at_its_end_changes_nothing(tmp_path: Path) -> None:
    data, train = write_llava(tmp_path), settings(tmp_path / "out", save_every=2)
    before, told = weights(run(data, train)), metrics(tmp_path / "out")
    after = weights(run(data, train, resume=True))
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert metrics(tmp_path / "out") == told


def test_resume_ignores_a_half_written_line_of_metrics(tmp_path: Path) -> None:
    data, train = write_llava(tmp_path), settings(tmp_path / "out", save_every=2)
    run(data, train)
    told = metrics(train.output_dir)
    shutil.rmtree(train.output_dir / "checkpoints" / "step-4")
    with (train.output_dir / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')
    run(data, train, resume=True)
    assert metrics(train.output_dir) == told


def test_resume_uses_the_rate_of_the_config_not_the_one_of_the_checkpoint(tmp_path: Path) -> None:
    """One number, one place: the table that is printed is the one that is used."""
    data, train = write_llava(tmp_path), settings(tmp_path / "out", save_every=2, schedule="constant", warmup=0.0)
    run(data, train)
    shutil.rmtree(train.output_dir / "checkpoints" / "step-4")
    train.learning_rate = LearningRates(connector=5e-4)
    run(data, train, resume=True)
    told = [line[0]["connector"] for line in metrics(train.output_dir, "learning_rate")]
    assert told == [1e-2, 1e-2, 5e-4, 5e-4]


def test_steps_are_ordered_as_numbers(tmp_path: Path) -> None:
    for step in (100, 9, 20):
        (tmp_path / "checkpoints" / f"step-{step}").mkdir(parents=True)
    assert [path.name for path in checkpoints(tmp_path)] == ["step-9", "step-20", "step-100"]


# ---------------------------------------------------------------- what is spoilt


def flip(path: Path) -> None:
    spoilt = bytearray(path.read_bytes())
    spoilt[len(spoilt) // 2] ^= 4
    path.write_bytes(bytes(spoilt))


SPOILT: dict[str, tuple[Callable[[Path], object], str]] = {
    "a bit of the weights": (lambda step: flip(step / "trained.safetensors"), "trained.safetensors has other bytes"),
    "a bit of the moments": (lambda step: flip(step / "optimizer.pt"), "optimizer.pt has other bytes"),
    "moments cut short": (lambda step: os.truncate(step / "optimizer.pt", 99), "optimizer.pt has 99 bytes"),
    "no state": (lambda step: (step / "state.json").unlink(), "state.json is missing"),
    "no manifest": (lambda step: (step / "manifest.json").unlink(), "no manifest.json: half-written"),
    "nothing in it": (lambda step: [shutil.rmtree(step), step.mkdir()], "no manifest.json: half-written"),
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the data, and a run of six steps with three checkpoints."""
    folder = tmp_path_factory.mktemp("finished")
    run(write_llava(folder), settings(folder / "out", steps=6, save_every=2, keep_last=3))
    return folder


@pytest.fixture
def copied(finished: Path, tmp_path: Path) -> Path:
    shutil.copytree(finished / "out", tmp_path / "out")
    return tmp_path / "out"


@pytest.mark.parametrize("how", SPOILT)
def test_spoilt_checkpoint_is_named_and_the_next_older_one_taken(
    finished: Path, copied: Path, how: str, capsys: Any
) -> None:
    spoil, said = SPOILT[how]
    spoil(copied / "checkpoints" / "step-6")
    spoil(copied / "checkpoints" / "step-4")
    run(finished / "data.json", settings(copied, steps=6, save_every=2, keep_last=3), resume=True)
    told = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning: ")]
    assert [f"step-{step} is passed over" in line for step, line in zip((6, 4), told, strict=True)] == [True, True]
    assert all(said in line for line in told)
    assert metrics(copied) == metrics(finished / "out")
    for step in (2, 4, 6):
        assert damage(copied / "checkpoints" / f"step-{step}") == ""


def test_no_whole_checkpoint_is_an_error_and_never_a_start_from_nothing(finished: Path, copied: Path) -> None:
    for step in (2, 4, 6):
        flip(copied / "checkpoints" / f"step-{step}" / "trained.safetensors")
    before = (copied / "metrics.jsonl").read_text()
    with pytest.raises(ValueError, match=r"(?s)no checkpoint in .* is whole:.*step-2: trained.*step-6: trained"):
        run(finished / "data.json", settings(copied, steps=6), resume=True)
    assert (copied / "metrics.jsonl").read_text() == before


def test_what_was_passed_over_is_not_counted_among_those_that_are_kept(finished: Path, copied: Path) -> None:
    flip(copied / "checkpoints" / "step-6" / "optimizer.pt")
    flip(copied / "checkpoints" / "step-4" / "optimizer.pt")
    run(finished / "data.json", settings(copied, steps=5, save_every=5), resume=True)
    assert [path.name for path in checkpoints(copied)] == ["step-2", "step-5"]


def test_left_overs_of_a_save_that_was_cut_off_are_cleared_away(finished: Path, copied: Path) -> None:
    folder = copied / "checkpoints"
    shutil.copytree(folder / "step-6", folder / ".partial-step-6")
    (folder / "step-6").rename(folder / ".replaced-step-6")  # between its two renames: the old one is still found
    (folder / "step-old").mkdir()
    run(finished / "data.json", settings(copied, steps=8, save_every=2, keep_last=3), resume=True)
    assert metrics(copied)[:6] == metrics(finished / "out")
    assert {path.name for path in folder.iterdir()} == {"step-old", "step-4", "step-6", "step-8"}


def test_checkpoint_is_hashed_once_a_run_and_again_if_it_changed(
    finished: Path, copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashed: list[str] = []
    digest = durable.digest
    monkeypatch.setattr(durable, "digest", lambda path: (hashed.append(path.name), digest(path))[1])
    run(finished / "data.json", settings(copied, steps=6), resume=True)
    assert sorted(hashed) == ["optimizer.pt", "state.json", "trained.safetensors"]
    flip(copied / "checkpoints" / "step-6" / "optimizer.pt")
    assert newest(copied) == copied / "checkpoints" / "step-4"


# ---------------------------------------------------------------- which are kept


def test_newest_checkpoints_are_kept_and_older_ones_go(tmp_path: Path) -> None:
    data = write_llava(tmp_path)
    run(data, settings(tmp_path / "two", steps=5, save_every=1))
    assert [path.name for path in checkpoints(tmp_path / "two")] == ["step-4", "step-5"]
    run(data, settings(tmp_path / "one", steps=5, save_every=1, keep_last=1))
    assert [path.name for path in checkpoints(tmp_path / "one")] == ["step-5"]


def test_best_checkpoints_stay_however_old(tmp_path: Path) -> None:
    saver = Saver(tmp_path)
    for step, loss in enumerate([5.0, 1.0, 4.0, 2.0, None, 3.0, float("nan")], start=1):
        saver.save(step, metric=loss, keep_last=2, keep_best=2)
    assert [path.name for path in checkpoints(tmp_path)] == ["step-2", "step-4", "step-6", "step-7"]
    saver.save(8, metric=0.5, keep_last=1, keep_best=2)
    assert [path.name for path in checkpoints(tmp_path)] == ["step-2", "step-8"]


def test_best_is_by_the_loss_of_the_run(tmp_path: Path) -> None:
    train = settings(tmp_path / "out", steps=6, save_every=1, keep_last=1, keep_best=1)
    run(write_llava(tmp_path), train)
    (newest_one,) = checkpoints(train.output_dir)[-1:]
    told = json.loads((newest_one / "state.json").read_text())["metric"]
    losses = [line[1] for line in metrics(train.output_dir)]
    assert told == pytest.approx(sum(losses) / len(losses))


def test_held_out_loss_goes_before_the_training_loss() -> None:
    lines = [{"loss": 3.0}, {"loss": 1.0}]
    assert metric(lines) == 2.0
    assert metric([]) is None
    held_out = [{"loss": 3.0, "held_out": {"loss": 2.5, "blank": 9.0}}, {"loss": 1.0, "held_out": {"loss": 2.75}}]
    assert metric([*held_out, {"loss": 0.5}]) == 2.75


class Saver:
    """Saves one model again and again."""

    def __init__(self, folder: Path) -> None:
        train = settings(folder)
        self.folder, self.model = folder, chosen_model(train)
        groups = parameter_groups(self.model, train.learning_rate, 0.0)
        self.trained = [parameter for group in groups for parameter in group["params"]]
        self.optimizer = torch.optim.AdamW(groups)

    def save(self, step: int, **options: Any) -> None:
        save_checkpoint(self.folder, step, self.model, self.optimizer, self.trained, "plan", **options)


def test_crash_while_saving_leaves_the_older_checkpoint_in_place(tmp_path: Path, monkeypatch: Any) -> None:
    saver = Saver(tmp_path)
    saver.save(1)
    with monkeypatch.context() as broken:
        broken.setattr(torch, "save", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
        with pytest.raises(OSError, match="disk full"):
            saver.save(2)
    assert [path.name for path in checkpoints(tmp_path)] == ["step-1"]
    saver.save(2)
    assert load_weights(tmp_path, saver.model, "plan") == 2
    load_optimizer(tmp_path, saver.model, saver.optimizer, saver.trained)


@pytest.mark.parametrize("change", [{"seed": 1}, {"rows_per_step": 2}])
def test_resume_with_another_plan_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    data = write_llava(tmp_path)
    run(data, settings(tmp_path / "out", save_every=2))
    with pytest.raises(ValueError, match="was made with other data"):
        run(data, settings(tmp_path / "out", save_every=2, **change), resume=True)


def test_resume_with_other_data_is_refused(tmp_path: Path) -> None:
    run(write_llava(tmp_path), settings(tmp_path / "out", save_every=2))
    with pytest.raises(ValueError, match="was made with other data"):
        run(write_llava(tmp_path, records=13), settings(tmp_path / "out"), resume=True)


@pytest.mark.parametrize(
    ("change", "said"),
    [(FULL, r"llm\..*not in the file"), (LORA, r"lora_.*not in the file")],
    ids=["more trains", "an adapter more"],
)
def test_resume_with_another_set_of_trained_weights_names_a_tensor(tmp_path, change, said) -> None:
    data = write_llava(tmp_path)
    run(data, settings(tmp_path / "out", save_every=2))
    with pytest.raises(ValueError, match=said):
        run(data, settings(tmp_path / "out", **change), resume=True)


def test_resume_with_another_lora_rank_names_a_tensor_and_both_shapes(tmp_path: Path) -> None:
    data = write_llava(tmp_path)
    run(data, settings(tmp_path / "out", save_every=2, **LORA))
    other = settings(tmp_path / "out", **{**LORA, "lora": Lora(rank=2, alpha=8)})
    with pytest.raises(ValueError, match=r"lora_.*\(4, .*in the file, \(2, "):
        run(data, other, resume=True)


def test_checkpoint_names_no_frozen_weight(tmp_path: Path) -> None:
    run(write_llava(tmp_path), settings(tmp_path / "out", save_every=4))
    folder = checkpoints(tmp_path / "out")[-1]
    assert (folder / "trained.safetensors").stat().st_size < 20_000
    assert json.loads((folder / "state.json").read_text())["step"] == 4
