"""The guard: a step with a loss or gradient that is not finite, or a loss that leaps, does not move the weights."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator

import mllm.train.loop
from engines import config_that_shards_all, start
from mllm.data.loader import PlannedBatches
from mllm.models.multimodal import MultimodalLM
from mllm.train.guard import Guard, GuardConfig
from mllm.train.losses import NextToken
from mllm.train.settings import TrainConfig
from runs import LORA, metrics, on_two_ranks, run, weights, write_llava
from runs import settings as settings_of_runs

SKIP = GuardConfig(policy="skip")
BAD = "r3"
"""The sample that spoils each step it is in."""


EXAMPLE = PlannedBatches.example


class Poisoned(NextToken):
    """The loss of a micro-batch is multiplied by `factor` where its first pixel says so."""

    factor = float("nan")

    def forward(self, *arguments: Any, **named: Any) -> Any:
        loss, each = super().forward(*arguments, **named)
        return (loss * self.factor if is_bad(named["pixel_values"]) else loss), each


class BadGradient(torch.autograd.Function):
    """The identity; its gradient is infinite."""

    @staticmethod
    def forward(context: Any, value: torch.Tensor) -> torch.Tensor:
        return value.clone()

    @staticmethod
    def backward(context: Any, *gradients: torch.Tensor) -> torch.Tensor:
        return gradients[0] * float("inf")


class Exploding(NextToken):
    """The loss is what it is, its gradient is not finite."""

    def forward(self, *arguments: Any, **named: Any) -> Any:
        loss, each = super().forward(*arguments, **named)
        return (BadGradient.apply(loss) if is_bad(named["pixel_values"]) else loss), each


def settings(folder: Path, **changes: Any) -> TrainConfig:
    """The objective is shown pixels, not features of a step's images."""
    return settings_of_runs(folder, encoder_batch=None, **changes)


def is_bad(pixel_values: torch.Tensor) -> bool:
    return bool((pixel_values == 255).flatten(1).all(1).any())


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    poison(monkeypatch)


def poison(monkeypatch: pytest.MonkeyPatch, objective: type[NextToken] = Poisoned, bad: str = BAD) -> None:
    """One picture is all white, and the objective does not like it."""
    example = EXAMPLE

    def marked(self: PlannedBatches, number: int) -> Any:
        made = example(self, number)
        if made.id == bad:
            made.pixel_values = torch.full_like(made.pixel_values, 255)
        return made

    monkeypatch.setattr(PlannedBatches, "example", marked)
    monkeypatch.setattr(mllm.train.loop, "NextToken", objective)


def lines(folder: Path, name: str = "guard.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def bad_steps(folder: Path) -> list[int]:
    return [line["step"] for line in lines(folder)]


def test_loss_that_is_nan_stops_the_run_before_the_weights_move_and_names_the_sample(
    poisoned: None, tmp_path: Path
) -> None:
    data = write_llava(tmp_path, 8)
    train = settings(tmp_path / "run")
    with pytest.raises(ValueError, match=r"the loss is nan.*micro-batch \d of rank 0.*train\.guard\.policy skip"):
        run(data, train)
    [line] = lines(tmp_path / "run")
    assert line["action"] == "stop"
    broken = [part for part in line["micro_batches"] if part["loss"] != part["loss"]]
    assert [BAD in part["sample_ids"] for part in broken] == [True]
    assert len(line["micro_batches"]) == 2
    finite = [part["loss"] for part in line["micro_batches"] if part["loss"] == part["loss"]]
    assert all(0 < loss < 20 for loss in finite)
    assert len(broken[0]["sample_ids"]) == len(broken[0]["where"])
    steps = len(lines(tmp_path / "run", "metrics.jsonl")) if (tmp_path / "run" / "metrics.jsonl").exists() else 0
    assert line["step"] == steps + 1  # no later step ran


@pytest.mark.parametrize("objective", [Poisoned, Exploding])
def test_step_that_is_skipped_leaves_weights_and_moments_bit_for_bit(
    objective: type[NextToken], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    poison(monkeypatch, objective)
    data = write_llava(tmp_path, 8)
    train = settings(tmp_path / "run", guard=SKIP, steps=6, save_every=1, keep_last=6)
    run(data, train)
    checkpoints = tmp_path / "run" / "checkpoints"
    skipped = bad_steps(tmp_path / "run")
    assert skipped
    assert [line["steps_skipped"] for line in lines(tmp_path / "run", "metrics.jsonl")][-1] == len(skipped)
    for step in range(2, 7):
        before, after = (
            torch.load(checkpoints / f"step-{n}" / "optimizer.pt", weights_only=True)["state"] for n in (step - 1, step)
        )
        if step in skipped:
            assert before.keys() == after.keys()
        same = [
            all(torch.equal(before[number][key], value) for key, value in state.items())
            for number, state in after.items()
            if number in before
        ]
        assert all(same) if step in skipped else not any(same)


def test_policy_of_skipping_ends_a_run_in_which_every_step_is_bad(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    poison(monkeypatch)
    data = write_llava(tmp_path, 1)
    (tmp_path / "data.json").write_text((tmp_path / "data.json").read_text().replace('"r0"', f'"{BAD}"'))
    train = settings(tmp_path / "run", guard=GuardConfig(policy="skip", max_skips=3), steps=9)
    with pytest.raises(ValueError, match=r"3 steps were left out in a row \(train\.guard\.max_skips\)"):
        run(data, train)
    assert [line["action"] for line in lines(tmp_path / "run")] == ["skip", "skip", "stop"]


def of_losses(losses: list[float], **changes: Any) -> Guard:
    guard = Guard(GuardConfig(policy="skip", **{"spike": 4.0, **changes}), Path())
    guard.remember((loss, 0) for loss in losses)
    return guard


LEVEL = [2.0 + 0.05 * (i % 5 - 2) for i in range(40)]


def test_loss_that_leaps_is_refused_and_its_neighbours_are_not() -> None:
    deviation = torch.tensor(LEVEL).double().std(correction=0)
    assert of_losses(LEVEL).refuses(2.0 + 4.01 * float(deviation))
    assert not of_losses(LEVEL).refuses(2.0 + 3.99 * float(deviation))
    assert not of_losses(LEVEL).refuses(0.1)


def test_leaps_are_let_be_where_nothing_was_asked_for_or_little_is_known() -> None:
    assert not of_losses(LEVEL, spike=0.0).refuses(100.0)
    assert not of_losses(LEVEL[:5]).refuses(100.0)
    assert of_losses(LEVEL[:5], window=5).refuses(100.0)


def test_loss_that_stands_still_may_move_by_its_noise() -> None:
    guard = of_losses([2.0] * 40)
    assert not guard.refuses(2.0 + 0.01)
    assert guard.refuses(2.2)


def test_steps_left_out_do_not_raise_the_mean() -> None:
    guard = of_losses(LEVEL)
    for _ in range(5):
        assert guard.refuses(50.0)
        guard.count(50.0, left_out=True)
        guard.cause = ""
    assert list(guard.losses) == LEVEL
    assert guard.in_a_row == 5


class Leaping(Poisoned):
    factor = 50.0


def test_resumed_run_skips_the_same_steps_to_the_same_weights(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    poison(monkeypatch, Leaping, bad="r1")  # in steps 15 and 18
    data = write_llava(tmp_path, 120)
    leap = GuardConfig(policy="skip", spike=8.0, window=12)
    train = settings(tmp_path / "run", guard=leap, steps=24, save_every=4, keep_last=6)
    whole = weights(run(data, train))
    before, found = metrics(train.output_dir, "step", "loss", "grad_norm", "steps_skipped"), lines(tmp_path / "run")
    assert bad_steps(tmp_path / "run") == [15, 18]
    assert "standard deviations" in found[0]["cause"]
    assert "'r1'" in str(found[0])
    for late in ("step-20", "step-24"):
        shutil.rmtree(train.output_dir / "checkpoints" / late)
    resumed = weights(run(data, train, resume=True))
    assert metrics(train.output_dir, "step", "loss", "grad_norm", "steps_skipped") == before
    assert lines(tmp_path / "run") == found
    assert all(torch.equal(resumed[name], weight) for name, weight in whole.items())


# ---------------------------------------------------------------- several ranks

LATE = "r15"
"""In step 6 for the first time."""
ENGINES = ["ddp", "zero1", "zero2", "zero3"]


def on_rank(rank: int, engine: str, data: Path, folder: Path) -> None:
    """Three runs of one engine: what is bad lies on one rank only."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    with pytest.MonkeyPatch.context() as patch:
        for name, objective, guard in CASES:
            poison(patch, objective, LATE)
            accelerator = start(engine, folder, "no")
            train_case(data, folder / engine / name, guard, accelerator)
            accelerator.wait_for_everyone()
    torch.distributed.destroy_process_group()


CASES: list[tuple[str, type[NextToken], GuardConfig]] = [
    ("nan", Poisoned, SKIP),
    ("gradient", Exploding, SKIP),
    ("leap", Leaping, GuardConfig(policy="skip", spike=8.0, window=4)),
]


def train_case(data: Path, folder: Path, guard: GuardConfig, accelerator: Accelerator | None) -> None:
    train = settings(folder, guard=guard, steps=7, save_every=7, rows_per_micro_batch=1, rows_per_step=4, **LORA)
    model = run(data, train, accelerator=accelerator)
    told = whole_weights(model)
    if accelerator is None or accelerator.is_main_process:
        torch.save(told, folder / "weights.pt")


def whole_weights(model: MultimodalLM) -> dict[str, torch.Tensor]:
    from mllm.train.engines.shards import whole

    return whole({name: p for name, p in model.named_parameters() if p.requires_grad}, keep=True)


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("deepspeed", reason="deepspeed is not installed: pip install 'mllm[deepspeed]'")
    folder = tmp_path_factory.mktemp("guards")
    data = write_llava(folder, 48)
    with pytest.MonkeyPatch.context() as patch:
        for name, objective, guard in CASES:
            poison(patch, objective, LATE)
            train_case(data, folder / "one" / name, guard, None)
    for engine in ENGINES:
        if engine != "ddp":
            (folder / f"{engine}.json").write_text(config_that_shards_all(engine))
        on_two_ranks(on_rank, engine, data, folder)
    return folder


@pytest.mark.recipe
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("case", [name for name, *_ in CASES])
def test_all_ranks_skip_the_same_step_and_go_on_as_one_process_does(engines: Path, engine: str, case: str) -> None:
    one, two = engines / "one" / case, engines / engine / case
    assert bad_steps(one) == bad_steps(two) == [6]
    numbers = [metrics(folder, "loss", "steps_skipped", "supervised_tokens") for folder in (one, two)]
    for ours, theirs in zip(*numbers, strict=True):
        assert theirs == pytest.approx(ours, rel=1e-4, nan_ok=True)
    expected, found = (torch.load(folder / "weights.pt", weights_only=True) for folder in (one, two))
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.recipe
@pytest.mark.parametrize("engine", ["one", *ENGINES])
def test_checkpoint_counts_the_steps_that_the_optimiser_took(engines: Path, engine: str) -> None:
    saved = torch.load(engines / engine / "nan" / "checkpoints" / "step-7" / "optimizer.pt", weights_only=True)
    assert {float(state["step"]) for state in saved["state"].values()} == {6.0}


@pytest.mark.recipe
@pytest.mark.parametrize("engine", ENGINES)
def test_samples_of_all_ranks_are_written_down(engines: Path, engine: str) -> None:
    for line in lines(engines / engine / "nan"):
        assert [part["rank"] for part in line["micro_batches"]] == [0, 0, 1, 1]
        assert [LATE in part["sample_ids"] for part in line["micro_batches"]].count(True) == 1
        assert sum(part["loss"] != part["loss"] for part in line["micro_batches"]) == 1
