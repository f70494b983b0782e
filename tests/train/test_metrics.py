"""What a run says: the same fields in the file and on the screen, and a file that a killed run leaves readable."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mllm.train.forecasting.flops import Cost
from mllm.train.saving.durable import keep_before
from mllm.train.watching.clock import MEASURED, Clock
from mllm.train.watching.picture import curves, draw_loss
from mllm.train.watching.screen import flat, sentence
from runs import metrics, run, settings


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def said(output: str) -> list[str]:
    return [line for line in output.splitlines() if line.startswith("step ")]


def test_screen_tells_each_step_with_the_fields_of_the_file(
    llava_folder: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(llava_folder(8), settings(tmp_path / "out", steps=3))
    written = lines(tmp_path / "out")
    assert said(capsys.readouterr().out) == [sentence(line, 3) for line in written]
    for line in written:
        names = sentence(line, 3).split("  ")[1:]
        assert [name.split(" ")[0] for name in names] == [name for name in flat(line) if name != "step"]


def test_every_line_tells_all_that_is_watched(llava_folder: Callable[..., Path], tmp_path: Path) -> None:
    run(llava_folder(8), settings(tmp_path / "out", steps=2))
    watched = {"loss", "supervised_tokens", "fill", "grad_norm", "learning_rate", "skipped", "tokens", "samples"}
    for line in lines(tmp_path / "out"):
        assert watched | set(MEASURED) <= line.keys()
        assert 0 <= line["data_wait"] <= 1
        assert line["tokens_per_second"] > 0
        assert 0 < line["mfu"] < 1
        assert line["peak_memory"] > 100 * 2**20  # torch alone is more


def test_screen_tells_every_second_step_and_the_last_where_it_is_asked_to(
    llava_folder: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(llava_folder(8), settings(tmp_path / "out", steps=5, log_every=2))
    assert [line.split("  ")[0] for line in said(capsys.readouterr().out)] == ["step 2/5", "step 4/5", "step 5/5"]
    assert [step for step, *_ in metrics(tmp_path / "out")] == [1, 2, 3, 4, 5]


def test_data_that_is_late_counts_as_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([10.0, 13.0, 14.0])
    monkeypatch.setattr("mllm.train.watching.clock.time.perf_counter", lambda: next(now))
    clock = Clock(Cost(0, 0, 0, 7e9), peak=50e9)
    monkeypatch.setattr("mllm.train.watching.clock.step_flops", lambda cost, block: len(block) * cost.per_image)
    assert clock.block(iter(["first", "second", "third"]), 2) == ["first", "second"]  # type: ignore[arg-type, comparison-overlap]
    told = clock.lap(200)
    assert (told["data_wait"], told["tokens_per_second"], told["mfu"]) == (0.75, 50.0, 0.07)


@pytest.mark.parametrize("half", ['{"step": 3, "learning_rate": {"connector": 0.1}', '{"step": 3, "lo', "{"])
def test_half_a_line_is_cut_off(half: str, tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n' + half)
    assert keep_before(path, 9) == [{"step": 1}, {"step": 2}]
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'


def test_cutting_the_file_leaves_the_old_one_if_it_cannot_be_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a run does that is killed in the middle of it."""
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n')

    def killed(number: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("mllm.train.saving.durable.os.fsync", killed)
    with pytest.raises(KeyboardInterrupt):
        keep_before(path, 1)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'


def test_fields_are_flat_and_what_is_no_number_is_left_out() -> None:
    line = {"step": 3, "loss": 2.5, "learning_rate": {"connector": 1e-3}, "note": "x", "held_out": {"gap": 0.5}}
    assert flat(line) == {"step": 3, "loss": 2.5, "learning_rate/connector": 1e-3, "held_out/gap": 0.5}


TOLD = [
    {"step": 1, "loss": 3.0, "source_loss": {"a": 3.5, "b": 2.0}},
    {"step": 2, "loss": 2.0, "source_loss": {"a": 2.5}, "held_out": {"loss": 2.2, "shuffled": 2.4}},
]


def test_picture_has_a_curve_for_the_run_each_source_and_each_held_out_loss(tmp_path: Path) -> None:
    drawn = {name: (steps, losses) for name, steps, losses, _ in curves(TOLD)}
    assert drawn == {
        "a": ([1, 2], [3.5, 2.5]),
        "b": ([1], [2.0]),
        "training": ([1, 2], [3.0, 2.0]),
        "held out": ([2], [2.2]),
        "shuffled images": ([2], [2.4]),
    }
    draw_loss(TOLD, tmp_path / "loss.png")
    assert Image.open(tmp_path / "loss.png").size[0] > 500
    assert [path.name for path in tmp_path.iterdir()] == ["loss.png"]


def test_picture_of_one_source_is_one_curve() -> None:
    one = [{"step": 1, "loss": 3.0, "source_loss": {"a": 3.0}}]
    assert [name for name, *_ in curves(one)] == ["training"]
