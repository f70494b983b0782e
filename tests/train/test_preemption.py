"""A run that is told to go ends its step, saves, and goes: on every rank, whoever was told, with workers or without."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from accelerate import Accelerator
from torch.multiprocessing import ProcessExitedException

from killing import Forked
from mllm.train import loop
from mllm.train.checkpoint import checkpoints
from mllm.train.metrics import Metrics
from mllm.train.saving.preemption import EXIT_CODE
from mllm.train.trainable import Lora
from runs import LORA, metrics, on_two_ranks, run, settings, write_llava

STEPS = 6
DROPOUT = {**LORA, "lora": Lora(rank=4, alpha=8, dropout=0.3)}


def at_step(step: int, act: Callable[[], object]) -> None:
    """Do something in the middle of a step of this process: between its update and its line of metrics."""
    told = Metrics.step

    def tell(self: Metrics, number: int, numbers: dict[str, Any]) -> None:
        if number == step:
            act()
        told(self, number, numbers)

    Metrics.step = tell  # type: ignore[method-assign]  # in a forked process, which ends


def signalled_run(data: Path, folder: Path, number: signal.Signals, step: int, **changes: Any) -> Callable[[], object]:
    """A run in which every process of the group gets a signal in the middle of a step."""

    def begin() -> None:
        at_step(step, lambda: os.killpg(0, number))
        run(data, settings(folder, steps=STEPS, **DROPOUT), **changes)

    return begin


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_run_that_is_told_to_go_ends_its_step_saves_and_goes_on_to_the_same_losses(
    tmp_path: Path, number: signal.Signals, workers: int
) -> None:
    data, out = write_llava(tmp_path), tmp_path / "out"
    whole = settings(tmp_path / "whole", steps=STEPS, **DROPOUT)
    run(data, whole)
    code = Forked(signalled_run(data, out, number, 3, num_workers=workers), tmp_path / "said").wait()
    said = (tmp_path / "said").read_text()
    assert code == EXIT_CODE == 143, said
    assert [path.name for path in checkpoints(out)] == ["step-3"]  # though save_every is not set
    assert [line[0] for line in metrics(out)] == [1, 2, 3]
    (line,) = [line for line in said.splitlines() if line.startswith("stopped after step 3 of 6")]
    assert "--resume goes on" in line
    run(data, settings(out, steps=STEPS, **DROPOUT), resume=True, num_workers=workers)
    assert metrics(out) == metrics(whole.output_dir)


def test_signal_in_the_last_step_changes_nothing(tmp_path: Path) -> None:
    data, out = write_llava(tmp_path), tmp_path / "out"
    assert Forked(signalled_run(data, out, signal.SIGTERM, STEPS), tmp_path / "said").wait() == 0
    assert len(metrics(out)) == STEPS
    assert not checkpoints(out)


def test_step_that_is_due_anyway_is_saved_once(tmp_path: Path) -> None:
    data, out = write_llava(tmp_path), tmp_path / "out"
    saved: list[int] = []
    save = loop.save_checkpoint

    def begin() -> None:
        loop.save_checkpoint = lambda folder, step, **more: (saved.append(step), save(folder, step, **more))
        at_step(4, lambda: os.kill(os.getpid(), signal.SIGTERM))
        try:
            run(data, settings(out, steps=STEPS, save_every=2))
        finally:
            print("saved", saved)

    assert Forked(begin, tmp_path / "said").wait() == EXIT_CODE
    assert "saved [2, 4]" in (tmp_path / "said").read_text()


def test_without_a_run_the_signals_mean_what_they_meant(tmp_path: Path) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)]
    run(write_llava(tmp_path), settings(tmp_path / "out"))
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)] == before


def test_run_whose_launcher_is_gone_stops_and_one_without_a_launcher_does_not(tmp_path: Path) -> None:
    """`accelerate launch` of one process does not pass a signal on: it dies, and leaves what it started alone."""
    data = write_llava(tmp_path)

    def begin(folder: Path) -> Callable[[], object]:
        def orphaned() -> None:
            at_step(2, lambda: setattr(os, "getppid", lambda: 1))
            run(data, settings(folder, steps=STEPS))

        return orphaned

    with pytest.MonkeyPatch.context() as launched:
        launched.setenv("ACCELERATE_MIXED_PRECISION", "no")
        assert Forked(begin(tmp_path / "launched"), tmp_path / "said").wait() == EXIT_CODE
    assert [path.name for path in checkpoints(tmp_path / "launched")] == ["step-2"]
    assert Forked(begin(tmp_path / "by hand"), tmp_path / "said").wait() == 0


def one_is_told(rank: int, data: Path, out: Path, told: dict[int, int]) -> None:
    """Ranks are told at the steps that stand in `told`, or never."""
    if rank in told:
        draw = loop.step_seed

        def at(seed: int, step: int, rank: int) -> int:
            if step + 1 == told[rank]:
                os.kill(os.getpid(), signal.SIGTERM)
            return draw(seed, step, rank)

        loop.step_seed = at
    run(data, settings(out, steps=STEPS), accelerator=Accelerator(cpu=True), num_workers=1)


@pytest.mark.parametrize(("told", "step"), [({0: 3}, 3), ({1: 3}, 3), ({0: 4, 1: 3}, 3)])
def test_all_ranks_stop_after_the_same_step_whoever_is_told(tmp_path: Path, told: dict[int, int], step: int) -> None:
    data, out = write_llava(tmp_path), tmp_path / "out"
    with pytest.raises(ProcessExitedException) as ended:
        on_two_ranks(one_is_told, data, out, told)
    assert ended.value.exit_code == EXIT_CODE
    assert [path.name for path in checkpoints(out)] == [f"step-{step}"]
    assert len(metrics(out)) == step
