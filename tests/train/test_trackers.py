"""Trackers draw the same numbers as `metrics.jsonl`, each step once, whatever happens to the run in between."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator

from mllm.config import RunConfig, validate
from mllm.output import remove
from mllm.stage import start
from mllm.train.watching import trackers
from mllm.train.watching.screen import flat
from mllm.train.watching.trackers import Tracking, options, run_id
from runs import on_two_ranks, run, settings, write_llava

LOGGED = "tensorboard/mllm"


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def drawn(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard shows: of each curve the points."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(folder / LOGGED))
    events.Reload()
    return {tag: [(point.step, point.value) for point in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def assert_drawn_as_written(folder: Path) -> None:
    curves, told = drawn(folder), [flat(line) for line in lines(folder)]
    assert curves.keys() == {name for line in told for name in line}
    for name, points in curves.items():
        assert [step for step, _ in points] == [line["step"] for line in told if name in line], name
        assert [value for _, value in points] == pytest.approx([line[name] for line in told if name in line], rel=1e-6)


@pytest.mark.filterwarnings("ignore")
def test_tensorboard_has_the_fields_and_the_numbers_of_the_file(
    llava_folder: Callable[..., Path], tmp_path: Path
) -> None:
    pytest.importorskip("tensorboard")
    run(llava_folder(8), settings(tmp_path / "out", steps=3, trackers=["tensorboard"]))
    assert_drawn_as_written(tmp_path / "out")
    assert "learning_rate/connector" in drawn(tmp_path / "out")


def test_resumed_run_goes_on_in_the_same_curves_and_draws_no_step_twice(
    llava_folder: Callable[..., Path], tmp_path: Path
) -> None:
    """Cut off after its fifth step, three behind its last checkpoint."""
    pytest.importorskip("tensorboard")
    data, config = llava_folder(8), settings(tmp_path / "out", steps=5, save_every=2, trackers=["tensorboard"])
    run(data, config)
    shutil.rmtree(config.output_dir / "checkpoints" / "step-4")
    config.steps, config.schedule = 7, "constant"
    run(data, config, resume=True)
    assert len(list((config.output_dir / LOGGED).glob("events*"))) == 2
    assert [step for step, _ in drawn(config.output_dir)["loss"]] == [1, 2, 3, 4, 5, 6, 7]
    assert_drawn_as_written(config.output_dir)


def test_run_that_was_cut_off_before_its_first_checkpoint_draws_no_step_twice(
    llava_folder: Callable[..., Path], tmp_path: Path
) -> None:
    pytest.importorskip("tensorboard")
    data, config = llava_folder(8), settings(tmp_path / "out", steps=3, trackers=["tensorboard"])
    run(data, config)
    name = run_id(config.output_dir)
    run(data, config, resume=True)
    assert run_id(config.output_dir) == name
    assert [step for step, _ in drawn(config.output_dir)["loss"]] == [1, 2, 3]


def on_rank(rank: int, data: Path, folder: Path) -> None:
    config = settings(folder, steps=2, rows_per_micro_batch=1, trackers=["tensorboard"])
    run(data, config, accelerator=Accelerator(cpu=True))
    torch.distributed.destroy_process_group()


def test_one_rank_alone_draws(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    on_two_ranks(on_rank, write_llava(tmp_path, 8), tmp_path / "out")
    assert len(list((tmp_path / "out" / LOGGED).glob("events*"))) == 1
    assert_drawn_as_written(tmp_path / "out")


def test_run_without_trackers_leaves_no_trace_of_them(llava_folder: Callable[..., Path], tmp_path: Path) -> None:
    run(llava_folder(8), settings(tmp_path / "out", steps=1))
    assert not {"tensorboard", "wandb", "trackers.json"} & {path.name for path in (tmp_path / "out").iterdir()}


def test_missing_package_stops_the_run_before_it_starts_and_says_how_to_install_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None)
    config = RunConfig(train=settings(tmp_path / "out", trackers=["wandb", "trackio"]))
    with pytest.raises(ValueError, match=r"wandb and trackio, not installed here: pip install wandb trackio"):
        start(config)
    assert not (tmp_path / "out").exists()


def test_trackers_are_given_as_a_list_or_with_commas_and_an_unknown_one_is_an_error(tmp_path: Path) -> None:
    def given(names: object) -> list[str]:
        raw = {"train": {"output_dir": str(tmp_path), "learning_rate": {"connector": 1e-3}, "trackers": names}}
        return list(validate(raw, "here").train.trackers)

    assert given("tensorboard,wandb") == given(["tensorboard", "wandb"]) == ["tensorboard", "wandb"]
    with pytest.raises(ValueError, match=r"train\.trackers\.0.*'tensorboard', 'wandb' or 'trackio'"):
        given("tensorbord")


class Service:
    """Stands for a tracker that takes what it gets."""

    def __init__(self, name: str) -> None:
        self.name, self.steps, self.ended = name, list[int](), 0

    def log(self, numbers: dict[str, float], step: int) -> None:
        self.steps.append(step)

    @property
    def tracker(self) -> Service:
        return self

    def finish(self, exit_code: int = 0) -> None:
        self.ended += 1
        self.exit_code = exit_code


def test_what_was_sent_to_a_service_before_the_cut_is_not_sent_again(tmp_path: Path) -> None:
    """TensorBoard, which forgets it, gets it anew."""
    services = [Service("wandb"), Service("trackio"), Service("tensorboard")]
    accelerator: Any = SimpleNamespace(is_main_process=True, trackers=list(services))
    tracking = Tracking(accelerator, settings(tmp_path), first_step=2, sent=4)
    tracking.is_on = True
    for step in (3, 4, 5, 6):
        tracking.log(step, {"loss": 1.0})
    tracking.__exit__(None, None, None)
    assert [service.steps for service in services] == [[5, 6], [5, 6], [3, 4, 5, 6]]
    assert [service.ended for service in services] == [1, 1, 1]


def test_run_that_fails_is_shown_as_failed(tmp_path: Path) -> None:
    services = [Service("wandb"), Service("trackio")]
    accelerator: Any = SimpleNamespace(is_main_process=True, trackers=list(services))
    tracking = Tracking(accelerator, settings(tmp_path), first_step=0, sent=0)
    tracking.is_on = True
    tracking.__exit__(ValueError, ValueError("broken"), None)
    assert [(service.ended, service.exit_code) for service in services] == [(1, 1), (1, 0)]


def test_services_know_a_resumed_run_by_its_id_and_a_new_one_by_another(tmp_path: Path) -> None:
    first = run_id(tmp_path)
    assert run_id(tmp_path) == first
    remove(tmp_path)  # as --overwrite does
    assert run_id(tmp_path) != first
    begun, resumed = (options(settings(tmp_path / "llava" / "align"), "abc", step) for step in (0, 4))
    assert (begun["wandb"]["name"], begun["wandb"]["id"]) == ("llava/align", "abc")
    assert (begun["wandb"], begun["trackio"]) == (resumed["wandb"], resumed["trackio"])
    assert resumed["tensorboard"] == {"purge_step": 5}
