"""Trackers draw the same numbers as `metrics.jsonl`, each step once, whatever happens to the run in between."""

from __future__ import annotations

import json
import shutil
import sqlite3
import struct
from collections.abc import Callable, Iterator
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


NONE = "is not installed: pip install 'mllm[trackers]'"


def cut_off_and_resumed(data: Path, folder: Path, name: Any) -> list[dict[str, Any]]:
    """Five steps in two goes, the first of which was cut off one step behind its last checkpoint; what the file has."""
    folder.mkdir()
    (folder / "config.yaml").write_text("model: {llm: tiny}\ntrain: {steps: 5}\n")
    config = settings(folder, steps=3, save_every=2, schedule="constant", trackers=[name])
    run(data, config)
    config.steps = 5
    run(data, config, resume=True)
    return [flat(line) for line in lines(folder)]


def assert_same_numbers(told: dict[int, dict[str, float]], written: list[dict[str, Any]]) -> None:
    """Each step once, with all fields of the file; of the step that was computed twice its first telling."""
    assert list(told) == [line["step"] for line in written] == [1, 2, 3, 4, 5]
    for line in written:
        own = told[line["step"]]
        assert own.keys() - {"step"} == line.keys() - {"step"}
        assert own["loss"] == pytest.approx(line["loss"], rel=1e-6)


@pytest.mark.filterwarnings("error:Reserved keys")
def test_trackio_has_the_numbers_of_the_file_each_step_once_and_the_config(
    llava_folder: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("trackio", reason=f"trackio {NONE}")
    import trackio.utils
    from trackio.sqlite_storage import SQLiteStorage

    monkeypatch.setattr(trackio.utils, "TRACKIO_DIR", tmp_path / "trackio")
    monkeypatch.setattr("trackio.sqlite_storage.TRACKIO_DIR", tmp_path / "trackio")
    written = cut_off_and_resumed(llava_folder(8), tmp_path / "out", "trackio")
    (database,) = (tmp_path / "trackio").glob("*.db")
    with sqlite3.connect(database) as opened:
        rows = opened.execute("select run_name, step, metrics from metrics order by id").fetchall()
    told = {step: {k: v for k, v in json.loads(numbers).items() if k != "timestamp"} for _, step, numbers in rows}
    assert len(rows) == 5
    assert {name for name, _, _ in rows} == {f"{tmp_path.name}/out-{run_id(tmp_path / 'out')}"}
    assert_same_numbers(told, written)
    config = SQLiteStorage.get_run_config(database.stem, rows[0][0])
    assert {k: v for k, v in config.items() if not k.startswith("_")} == {
        "model": {"llm": "tiny"},
        "train": {"steps": 5},
    }


def records(file: Path) -> Iterator[Any]:
    """What wandb wrote offline: one message behind the other, each with checksum, length and kind in front."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, place = file.read_bytes(), 7
    assert len(data) < 2**15, "longer files are cut into blocks"
    while place < len(data):
        _, length, kind = struct.unpack("<IHB", data[place : place + 7])
        assert kind == 1
        record = Record()
        record.ParseFromString(data[place + 7 : place + 7 + length])
        yield record
        place += 7 + length


@pytest.mark.filterwarnings("ignore")
def test_wandb_offline_has_the_numbers_of_the_file_each_step_once_and_the_config(
    llava_folder: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb", reason=f"wandb {NONE}")
    for name, value in {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "WANDB_CONSOLE": "off"}.items():
        monkeypatch.setenv(name, value)
    out = tmp_path / "out"
    written = cut_off_and_resumed(llava_folder(8), out, "wandb")
    told: dict[int, dict[str, float]] = {}
    files = sorted((out / "wandb").glob("offline-run-*/*.wandb"))
    assert [file.stem for file in files] == [f"run-{run_id(out)}"] * 2
    for file in files:
        found: dict[str, list[Any]] = {}
        for record in records(file):
            found.setdefault(record.WhichOneof("record_type"), []).append(record)
        assert [record.exit.exit_code for record in found["exit"]] == [0]
        (begun, *_) = found["run"]
        assert (begun.run.project, begun.run.display_name) == ("mllm", f"{tmp_path.name}/out")
        configs = [record.config for record in found["config"]]
        values = {item.key: json.loads(item.value_json) for config in configs for item in config.update}
        assert {"model": {"llm": "tiny"}, "train": {"steps": 5}}.items() <= values.items()
        for record in found["history"]:
            items = {i.key or ".".join(i.nested_key): json.loads(i.value_json) for i in record.history.item}
            step = record.history.step.num
            assert step not in told
            told[step] = {name: value for name, value in items.items() if not name.startswith("_")}
    assert_same_numbers(told, written)


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
