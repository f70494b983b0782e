"""A rank that stands still is named by the others, with its step and its samples; an error on one rank stops all."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import mllm.train.loop
from engines import start
from hanging import launch_with
from mllm.data.loader import PlannedBatches
from mllm.train.losses import NextToken
from mllm.train.watchdog import Watchdog
from mllm.train.watching.alarm import EXIT_CODE
from mllm.train.watching.stops import RankStopped
from mllm.train.watching.waits import Seen, Standing, sentence, suspects
from runs import as_rank, metrics, run, settings, write_llava

BAD = {0: "r7", 1: "r4"}
"""For each rank a sample that it reads in step 3."""
SECONDS, STOP_SECONDS = 2.0, 5.0


def stands_still(number: str, how: Callable[[], None]) -> None:
    """`how` happens where one sample is read; reading others takes so long that a step is longer than a pulse."""
    example = PlannedBatches.example

    def slow(self: PlannedBatches, row: int) -> Any:
        if self.index.id(row) == number:
            how()
        time.sleep(0.1)
        return example(self, row)

    PlannedBatches.example = slow  # type: ignore[method-assign]


def stop_self() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def sleep_long() -> None:
    time.sleep(600)


def raise_in_forward(message: str, kind: type[Exception]) -> type[NextToken]:
    class Raising(NextToken):
        def forward(self, *arguments: Any, **named: Any) -> Any:
            if torch.distributed.get_rank() == 1:
                raise kind(message)
            return super().forward(*arguments, **named)

    return Raising


def on_rank(rank: int, case: str, culprit: int, data: Path, folder: Path) -> None:
    """One run; the samples of rank `culprit` hold the one at which it stands still."""
    sys.stdout = sys.stderr = (folder / f"{rank}.txt").open("w", buffering=1)
    accelerator = start("ddp", folder)
    if case in ("stopped", "asleep") and rank == culprit:
        stands_still(BAD[culprit], {"stopped": stop_self, "asleep": sleep_long}[case])
    if case == "error":
        mllm.train.loop.NextToken = raise_in_forward("this batch is bad", ValueError)  # type: ignore[misc]
    if case == "crash":
        mllm.train.loop.NextToken = raise_in_forward("a bug", KeyError)  # type: ignore[misc]
    train = settings(folder / "run", steps=40, hang_seconds=SECONDS, hang_stop_seconds=STOP_SECONDS)
    try:
        run(data, train, accelerator=accelerator)
    except RankStopped as error:
        print(f"stopped by another: {error}")
        sys.exit(error.code)
    except Exception as error:
        print(f"own error: {error}; silent: {getattr(error, 'silent', None)}")
        sys.exit(2 if isinstance(error, ValueError) else 1)
    torch.distributed.destroy_process_group()


def two_ranks(case: str, culprit: int, folder: Path) -> tuple[list[int | None], float]:
    """Exit codes, and the seconds until the first rank ended; a rank that stands still for ever is killed."""
    data = write_llava(folder, 24)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    fork = multiprocessing.get_context("fork")
    ranks = [fork.Process(target=as_rank, args=(r, port, on_rank, case, culprit, data, folder)) for r in (0, 1)]
    for rank in ranks:
        rank.start()
    began = time.monotonic()
    ranks[1 - culprit].join(timeout=40)
    took = time.monotonic() - began
    if case in ("stopped", "asleep"):
        time.sleep(0.5)
        ranks[culprit].kill()
    ranks[culprit].join(timeout=60)
    return [rank.exitcode for rank in ranks], took


def hangs(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "run" / "hang.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(("case", "culprit"), [("stopped", 1), ("asleep", 1), ("stopped", 0)])
def test_rank_that_stands_still_is_named_with_its_step_and_samples_and_the_run_ends(
    case: str, culprit: int, tmp_path: Path
) -> None:
    codes, _ = two_ranks(case, culprit, tmp_path)
    assert codes[1 - culprit] == EXIT_CODE
    said = (tmp_path / f"{1 - culprit}.txt").read_text()
    first, last = hangs(tmp_path)[0], hangs(tmp_path)[-1]
    assert len(metrics(tmp_path / "run")) == 2
    for line in (first, last):
        [one] = line["waits_for"]
        assert (line["rank"], one["rank"]) == (1 - culprit, culprit)
        assert one["step"] == line["step"] == 3
        assert one["phase"] == "loading"
        assert BAD[culprit] in one["sample_ids"]
        assert one["answers"] is (case == "asleep")
    assert SECONDS <= first["seconds"] < 2.5 * SECONDS
    assert [first["ends"], last["ends"]] == [False, True]
    assert f"for rank {culprit} (step 3, loading" in said
    assert BAD[culprit] in said
    if case == "asleep":
        assert "in sleep_long" in said
    else:
        assert "does not answer: it was stopped" in said


@pytest.mark.parametrize(("case", "code", "words"), [("error", 2, "this batch is bad"), ("crash", 1, "a bug")])
def test_error_on_one_rank_stops_the_other_with_its_words(case: str, code: int, words: str, tmp_path: Path) -> None:
    codes, took = two_ranks(case, 1, tmp_path)
    assert codes == [code, code]
    assert took < 60
    first, second = ((tmp_path / f"{rank}.txt").read_text() for rank in (0, 1))
    assert "stopped by another: rank 1 stopped at step 1: " in first
    assert words in first
    assert first.count("error: rank 1 stopped at step 1") == 1
    assert words in second
    assert "silent: False" in second


# ---------------------------------------------------------------- who is waited for


def seen(rank: int, **changes: Any) -> Seen:
    """A rank that has worked at step 7 for 50 seconds, and waits for others in it."""
    standing = Standing(rank, beats=6, step=7, phase="backward", ids=(f"a{rank}",))
    own = {key: changes.pop(key) for key in list(changes) if hasattr(standing, key)}
    plain: dict[str, Any] = {"number": 1, "heard": 100.0, "age": 50.0, "at": "", "exchanging": True}
    return Seen(standing=replace(standing, **own), **{**plain, **changes})


def named(*ranks: Seen) -> list[int]:
    return [one.standing.rank for one in suspects(ranks, now=101.0, seconds=45.0, quiet=3.0)]


def test_rank_behind_the_others_is_the_one_they_wait_for() -> None:
    assert named(seen(0), seen(1, beats=2, phase="loading"), seen(2)) == [1]
    assert named(seen(0), seen(1, step=6, beats=40), seen(2)) == [1]


def test_rank_that_is_silent_comes_before_one_that_is_behind() -> None:
    assert named(seen(0), seen(1, beats=2), seen(2, heard=90.0)) == [2]


def test_what_may_last_is_no_alarm_until_it_lasts_very_long() -> None:
    assert named(seen(0), seen(1, beats=2, slow=True)) == []
    assert named(seen(0), seen(1, beats=2, slow=True, age=5 * 45.0 + 1)) == [1]
    assert named(seen(0), seen(1, beats=2, slow=True, heard=90.0)) == [1]  # a process that is stopped is no slow one


def test_ranks_that_all_work_at_the_same_are_no_alarm_and_all_that_load_are() -> None:
    assert named(seen(0), seen(1)) == []
    assert named(seen(0, exchanging=False), seen(1, exchanging=False)) == []
    assert named(seen(0), seen(1, exchanging=False)) == [1]
    assert named(seen(0, phase="loading"), seen(1, phase="loading")) == [0, 1]
    assert named(seen(0, phase="loading")) == [0]


def test_sentence_names_rank_step_phase_and_samples() -> None:
    one = seen(1, phase="loading", at="files.py:12 in read", micro_batch=3)
    told = sentence(Standing(0, step=7, phase="summing the loss"), 46.0, [one], now=101.0, quiet=3.0)
    assert told == (
        "rank 0 waits for 46 s in step 7 (summing the loss) for rank 1 (step 7, loading, micro-batch 3, samples a1; "
        "it stands in files.py:12 in read)"
    )


def test_standing_is_the_same_after_its_way_through_the_store() -> None:
    standing = Standing(3, 4, 5, "forward", 1, ("a", "ü"), True)
    assert Standing.read(3, standing.text().encode()) == standing


def test_beats_of_a_step_are_counted_from_its_first() -> None:
    first = Standing(0).next(step=1, phase="loading", ids=("a",), slow=False)
    later = first.next(ids=("b",)).next(phase="forward")
    assert (first.place, later.place) == ((1, 0), (1, 1))
    assert later.next(step=2, phase="loading").place == (2, 0)


@pytest.mark.parametrize("compiles", [False, True])
def test_every_phase_of_a_first_step_that_compiles_may_last_and_none_of_later_ones(
    compiles: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quick: dict[int, set[str]] = {1: set(), 2: set()}
    stand = Watchdog.stand

    def noted(self: Watchdog, **changes: Any) -> None:
        stand(self, **changes)
        if self.standing.step and not self.standing.slow:
            quick[self.standing.step].add(self.standing.phase)

    monkeypatch.setattr(Watchdog, "stand", noted)
    monkeypatch.setattr(mllm.train.loop.compiling, "switch_on", lambda *_: None)  # what it does is told elsewhere
    run(write_llava(tmp_path, 12), settings(tmp_path / "run", steps=2, compile=compiles))
    assert {"forward", "backward", "updating the weights"} <= quick[2]
    assert quick[1] == (set() if compiles else quick[2] - {"loading"})


# ---------------------------------------------------------------- under a real launcher


@pytest.mark.recipe
def test_error_on_one_rank_is_said_once_by_each_and_the_launcher_fails(hub: Path, tmp_path: Path) -> None:
    done, _ = launch_with("error", 1, hub, tmp_path)
    assert done.returncode != 0
    said = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(said) == 2
    [own] = [line for line in said if not line.startswith("error: rank 1")]
    [other] = [line for line in said if line.startswith("error: rank 1")]
    assert own.startswith("error: this batch is bad. In the micro-batch of ")
    assert other == f"error: rank 1 stopped at step 2: {own.removeprefix('error: ')}"
    assert len(metrics(tmp_path / "align")) == 1
    assert "Traceback" not in done.stderr.split("torch/distributed")[0]
