"""The benchmark of a GPU shares out its minutes so that all configurations get a figure, and goes on where it ended."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

RECIPES = Path(__file__).parents[1] / "recipes"
sys.path.append(str(RECIPES))

from benchmarks import chatting, planning, resuming, training  # noqa: E402
from benchmarks.configurations import configurations  # noqa: E402
from benchmarks.page import read_results, tables  # noqa: E402
from benchmarks.planning import NO_TIME, Schedule, arranged, paid, price  # noqa: E402
from benchmarks.report import machine  # noqa: E402
from benchmarks.stopwatch import Budget, Enough, Stopwatch  # noqa: E402

NAMES = [row.name for row in configurations()]


class Device:
    """A clock that only its own rows move: each costs what it is foretold, times a factor."""

    def __init__(self, factor: float) -> None:
        self.factor, self.now = factor, 0.0

    def clock(self) -> float:
        return self.now

    def spend(self, seconds: float) -> None:
        self.now += self.factor * seconds

    def attempt(self, row: Any, budget: Budget, *_: Any) -> dict[str, Any]:
        watch, cost = Stopwatch(budget, torch.device("cpu"), clock=self.clock), price(row, paid())
        self.spend(cost.beside)
        try:
            watch.step_ended()
            while True:
                self.spend(cost.step)
                watch.step_ended()
        except Enough:
            return {"tokens_per_second": 1.0, "steps": len(watch.step_seconds())}


def simulated(
    monkeypatch: pytest.MonkeyPatch, minutes: float, factor: float = 1.0, known: dict[str, Any] | None = None
) -> tuple[dict[str, Any], float]:
    """The rows, and the seconds that it took."""
    device = Device(factor)
    monkeypatch.setattr(training, "attempt", device.attempt)
    for name, stand_in in {"limits": lambda _: {}, "forget": lambda _: None, "works": lambda _: True}.items():
        monkeypatch.setattr(training, name, stand_in)
    where, write, say = torch.device("meta"), lambda found: None, lambda words: None
    found = training.measure(configurations(), minutes, False, write, say, where, known, device.clock)
    return found["rows"], device.now


def for_training(minutes: float) -> float:
    """What `gpu` leaves it."""
    own = runpy.run_path(str(RECIPES / "benchmark.py"), run_name="imported")
    return minutes - own["CHAT_MINUTES"] - own["START_MINUTES"]


def test_nine_minutes_hold_every_configuration_and_a_dozen_padded_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    minutes = for_training(9)
    rows, spent = simulated(monkeypatch, minutes)
    assert list(rows) == NAMES
    for row in configurations():
        assert rows[row.name]["steps"] >= (12 if row.way == "naive" else 3), row.name
    assert spent <= 60 * minutes


def test_more_minutes_are_more_steps_and_are_not_exceeded(monkeypatch: pytest.MonkeyPatch) -> None:
    few, _ = simulated(monkeypatch, for_training(9))
    many, spent = simulated(monkeypatch, 20)
    assert sum(row["steps"] for row in many.values()) > 1.5 * sum(row["steps"] for row in few.values())
    assert spent <= 20 * 60


@pytest.mark.parametrize("factor", [1.3, 2.0])
def test_a_slower_device_ends_in_time_and_another_call_measures_the_rest(
    monkeypatch: pytest.MonkeyPatch, factor: float
) -> None:
    first, spent = simulated(monkeypatch, 7, factor)
    late = [name for name, row in first.items() if row.get("error", "").startswith(NO_TIME)]
    dearest = max(Schedule(configurations(), paid()).least(row) for row in configurations())
    assert late
    assert spent <= 7 * 60 + factor * dearest
    kept = resuming.with_figures(first)
    assert set(kept) == set(NAMES) - set(late)
    known = {"began": 0.0, "minutes": 7, "rows": dict(kept)}
    both, _ = simulated(monkeypatch, 14, factor, known)
    assert set(resuming.with_figures(both)) == set(NAMES)
    assert all(both[name] is kept[name] for name in kept)


def test_the_price_of_a_measured_row_is_what_it_took() -> None:
    known = paid()
    for row in configurations():
        if "laps" in known.get(row.name, {}):
            kept = known[row.name]
            cost = price(row, {row.name: {**kept, "fill": 1.0, "timed_fill": 1.0}})
            steps = kept["warm_up"] - 1 + kept["steps"] + (2 if row.way == "naive" else 1)
            assert cost.beside + steps * cost.step == pytest.approx(kept["wall_seconds"], rel=0.2), row.name


def test_a_row_without_laps_has_the_price_of_its_like() -> None:
    like = {row.name: row for row in configurations()}
    known = {"S2 7B": paid()["S2 7B"], "B0 1.5B": paid()["B0 1.5B"]}
    peft, fast = price(like["S2 peft 7B"], known), price(like["S2 7B"], known)
    assert peft.step == pytest.approx(planning.SLOWER * fast.step)
    assert price(like["S2 1.5B"], known).step == pytest.approx(fast.step / planning.COST["7B"])
    assert price(like["B1 1.5B"], known).step == price(like["B0 1.5B"], known).step


def test_what_has_no_figure_comes_first_and_what_failed_last() -> None:
    rows = configurations()[:4]
    figures = {
        rows[0].name: {"tokens_per_second": 1.0},
        rows[1].name: {"error": "out of memory"},
        rows[2].name: {"error": f"{NO_TIME} of --minutes 1"},
    }
    assert [rows.index(row) for row in arranged(rows, figures)] == [2, 3, 0, 1]
    assert arranged(rows, {}) == rows


def written(path: Path, **own: Any) -> Path:
    told = {"rows": {"B4 1.5B": {"tokens_per_second": 1.0}}, "code": resuming.fingerprint(), "machine": machine()}
    path.write_text(json.dumps({**told, **own}))
    return path


def test_figures_of_this_machine_and_this_code_are_gone_on_with(tmp_path: Path) -> None:
    assert resuming.earlier(tmp_path / "none.json", machine()) is None
    found = resuming.earlier(written(tmp_path / "out.json"), machine())
    assert found is not None
    assert list(found["rows"]) == ["B4 1.5B"]


@pytest.mark.parametrize(
    ("own", "why"),
    [
        ({"code": "another"}, r"the code in mllm/ and recipes/ has changed since. Give another folder, or delete"),
        ({"machine": {**machine(), "gpu": "NVIDIA H100"}}, "with gpu NVIDIA H100, here is "),
        ({"machine": {**machine(), "torch": "1.0"}}, r"with torch 1\.0, here is "),
        ({"machine": {**machine(), "date": "2020-01-01"}}, "days old"),
    ],
)
def test_figures_of_elsewhere_are_refused(tmp_path: Path, own: dict[str, Any], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        resuming.earlier(written(tmp_path / "out.json", **own), machine())


def test_chat_is_complete_where_every_way_of_every_size_has_figures() -> None:
    found = read_results()["chat-h200"]
    assert chatting.is_complete(found, chatting.ON_GPU)
    found["7B"]["ways"]["recorded"] = {"error": "out of memory"}
    assert not chatting.is_complete(found, chatting.ON_GPU)
    assert chatting.is_complete(found, {"1.5B": "so400m-384"})


def test_a_change_of_the_code_changes_its_fingerprint(tmp_path: Path) -> None:
    (tmp_path / "mllm").mkdir()
    (tmp_path / "mllm" / "a.py").write_text("1")
    before = resuming.fingerprint(tmp_path)
    assert resuming.fingerprint(tmp_path) == before
    (tmp_path / "mllm" / "a.py").write_text("2")
    assert resuming.fingerprint(tmp_path) != before


def command(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmark.py", *map(str, arguments)])
    runpy.run_path(str(RECIPES / "benchmark.py"), run_name="__main__")


def test_one_command_measures_training_and_chat(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[list[str]] = []

    def run(command: list[str]) -> Any:
        called.append(command[2:])
        return subprocess.CompletedProcess(command, returncode=len(called) - 1)

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(SystemExit, match="1"):
        command(monkeypatch, "gpu", "--out", tmp_path, "--minutes", 9, "--known", tmp_path / "known.json")
    known = ["--known", str(tmp_path / "known.json")]
    assert called == [
        ["train", "--minutes", "7.2", "--json", str(tmp_path / "train.json"), "--resume", *known],
        ["chat", "--json", str(tmp_path / "chat.json"), "--resume", "--repeats", "3"],
    ]


def test_without_a_gpu_the_command_is_rehearsed_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In this process: the rows of a GPU at tiny sizes, two calls into one file."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(training, "configurations", lambda: [row for row in configurations() if row.name in DONE])
    path, called = tmp_path / "train.json", []
    attempt = training.attempt

    def counted(row: Any, *arguments: Any) -> dict[str, Any]:
        called.append(row.name)
        return attempt(row, *arguments)

    monkeypatch.setattr(training, "attempt", counted)
    for only in (["S2 peft 7B"], ["S2", "B0"]):
        command(monkeypatch, "train", "--tiny", "--resume", "--json", path, "--minutes", 1, "--only", *only)
    assert sorted(called) == sorted(DONE)
    found = json.loads(path.read_text())
    assert {name: row.get("error") for name, row in found["rows"].items()} == dict.fromkeys(DONE)
    assert list(found["rows"]) == [name for name in NAMES if name in DONE]  # S2 peft 7B was measured first
    assert found["calls"] == 2
    page = tables(found)
    assert "In 2 calls" in page
    assert "A rehearsal at tiny sizes" in page


DONE = ("S2 peft 7B", "S2 naive 7B", "B0 1.5B")


def test_adapters_may_be_left_to_peft(monkeypatch: pytest.MonkeyPatch) -> None:
    from mllm.train.tuning import fast_lora

    switched: list[str] = []
    monkeypatch.setattr(fast_lora, "switch_on", lambda *_: switched.append("on") or 0)
    row = next(row for row in configurations() if row.name == "S2 peft 7B")
    for fast in (False, True):
        own = training.tiny(replace(row, fast_lora=fast))
        training.one(own, planning.budget_of(own), torch.device("cpu"), lambda words: None, 16)
        assert switched == ["on"] * fast


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["gpu", "--out", "x", "--minutes", 0.5], "chat, and starting, take about 0.6 of them"),
        (["train", "--resume"], "--resume goes on with the file of --json: name it"),
        (["train", "--known", "nowhere.json"], "--known nowhere.json: there is no such file"),
        (["train", "--only", "B4"], "--only B4 names configurations of a GPU, and there is none"),
    ],
)
def test_what_cannot_be_done_is_said(monkeypatch: pytest.MonkeyPatch, arguments: list[Any], why: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match=why):
        command(monkeypatch, *arguments)
