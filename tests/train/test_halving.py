"""Out of memory: the step is done again in halves, to the same loss and weights, on all ranks or not at all."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import nn

import mllm.train.loop
from conftest import make_processor, make_sample
from engines import make_ready, start
from mllm.data.collate import collate
from mllm.data.packing import join
from mllm.train.halving import Room, split
from mllm.train.losses import NextToken, num_supervised
from mllm.train.settings import TrainConfig
from mllm.train.trainable import Lora
from mllm.train.watching.stops import RankStopped
from mllm.types import Batch, Example, Fault
from runs import LORA, metrics, on_two_ranks, run, settings, weights, write_llava

SHAPE = (3, 28, 28)


class Hungry(NextToken):
    """Memory for `fits` rows at a time, in the forward or in the backward pass."""

    fits = 1
    where = "forward"

    def forward(self, *arguments: Any, **named: Any) -> Any:
        loss, each = super().forward(*arguments, **named)
        if len(named["input_ids"]) <= self.fits:
            return loss, each
        if self.where == "forward":
            raise torch.OutOfMemoryError("made up")
        return FailsBackward.apply(loss), each


class FailsBackward(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, value: torch.Tensor) -> torch.Tensor:
        return value.clone()

    @staticmethod
    def backward(context: Any, *gradients: torch.Tensor) -> torch.Tensor:
        raise torch.OutOfMemoryError("made up")


def hungry(fits: int, where: str = "forward") -> type[NextToken]:
    return type("Hungry", (Hungry,), {"fits": fits, "where": where})


DROPOUT = {"lora": Lora(rank=4, alpha=8, dropout=0.2)}
"""It must draw alike however often a step is tried."""


def lora(folder: Path, rows: int, **changes: Any) -> TrainConfig:
    return settings(folder, **{**LORA, "rows_per_step": 4, "rows_per_micro_batch": rows, **changes})


@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize(("begins", "fits"), [(4, 1), (4, 2), (2, 1)])
def test_run_that_halves_equals_the_run_that_began_so(
    begins: int, fits: int, where: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any
) -> None:
    data = write_llava(tmp_path, 12)
    small = weights(run(data, lora(tmp_path / "small", fits, **DROPOUT)))
    monkeypatch.setattr(mllm.train.loop, "NextToken", hungry(fits, where))
    large = weights(run(data, lora(tmp_path / "large", begins, **DROPOUT)))
    assert metrics(tmp_path / "large") == metrics(tmp_path / "small")
    assert all(torch.equal(large[name], weight) for name, weight in small.items())
    said = capsys.readouterr().err
    assert said.count("out of memory with") == (begins // fits) // 2  # once each time the size changes
    assert f"the run goes on with {fits}, with the same rows a step and the same loss" in said


def test_row_that_does_not_fit_alone_stops_the_run_with_the_levers(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(mllm.train.loop, "NextToken", hungry(0))
    levers = r"single row, in the micro-batch of .*data\.json.*data\.seq_length.*gradient_checkpointing.*ZeRO"
    with pytest.raises(ValueError, match=levers):
        run(write_llava(tmp_path, 12), lora(tmp_path / "run", 2))


def some_rows() -> Batch:
    """Rows with 1, 0, 2 and 1 + 1 images, of very different length; one holds a hole."""
    processor = make_processor()
    examples = [processor(make_sample(i, images, extra="word " * i)) for i, images in enumerate((1, 0, 2, 1, 1))]
    fault = Fault("image", "gone", "made.json, row 9", "it is not there")
    hole = Example("gone", [0] * 9, [-100] * 9, torch.empty(0, *SHAPE, dtype=torch.uint8), fault.where, fault)
    rows = [[examples[0]], [examples[1], hole], [examples[2]], [examples[3], examples[4]]]
    return collate([join(row, SHAPE) for row in rows], SHAPE)


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 9])
def test_parts_hold_the_rows_of_the_whole_with_their_own_images(rows: int) -> None:
    whole = some_rows()
    parts = split(whole, rows)
    assert [len(part["input_ids"]) for part in parts] == [min(rows, 4 - first) for first in range(0, 4, rows)]
    shown = [part["pixel_values"][: part["num_images"]] for part in parts]
    assert torch.equal(torch.cat(shown), whole["pixel_values"])
    assert all(len(part["pixel_values"]) for part in parts)
    for name in ("row_images", "sample_ids", "where", "faults"):
        assert [thing for part in parts for thing in part[name]] == whole[name]  # type: ignore[literal-required]
    assert all(sum(part["row_images"]) == part["num_images"] for part in parts)
    assert sum(map(num_supervised, parts)) == num_supervised(whole)


def test_part_is_the_batch_that_collate_makes_of_its_rows() -> None:
    processor = make_processor()
    rows = [join([processor(make_sample(i, i % 2, extra="word " * 9 * i))], SHAPE) for i in range(3)]
    for part, row in zip(split(collate(rows, SHAPE), 1), rows, strict=True):
        for name, value in collate([row], SHAPE).items():
            same = torch.equal(part[name], value) if isinstance(value, torch.Tensor) else part[name] == value  # type: ignore[literal-required]
            assert same, name


def test_only_what_is_larger_than_all_before_is_untried() -> None:
    room, whole = Room(), some_rows()
    assert room.untried([whole])
    room.fits([whole])
    assert not room.untried([whole, *split(whole, 1)])
    wider = Batch(**{**whole, "input_ids": nn.functional.pad(whole["input_ids"], (0, 8))})  # type: ignore[typeddict-item]
    assert room.untried([whole, wider])


# ---------------------------------------------------------------- several ranks


class HungryOnOneRank(Hungry):
    """Only rank 1 has too little."""

    def forward(self, *arguments: Any, **named: Any) -> Any:
        self.fits = 1 if torch.distributed.get_rank() else 99
        return super().forward(*arguments, **named)


class HungryLater(HungryOnOneRank):
    """And only when the gradients already travel during the last backward pass: in its third step."""

    calls = 0

    def forward(self, *arguments: Any, **named: Any) -> Any:
        type(self).calls += 1
        if self.calls <= 4:
            return NextToken.forward(self, *arguments, **named)
        return super().forward(*arguments, **named)


DDP: dict[str, type[NextToken]] = {
    "forward": HungryOnOneRank,
    "backward": type("Backward", (HungryOnOneRank,), {"where": "backward"}),
    "later": HungryLater,
    "fits": NextToken,
    "hopeless": type("Hopeless", (Hungry,), {"fits": 0}),
}


def on_rank(rank: int, data: Path, folder: Path) -> None:
    """Each case under DDP; what stopped it is written down."""
    for name, objective in DDP.items():
        accelerator = start("ddp", folder, "no")
        mllm.train.loop.NextToken = objective  # type: ignore[misc]
        try:
            model = run(data, lora(folder / name, 2, rows_per_step=8), accelerator=accelerator)
            torch.save(weights(model), folder / name / f"{rank}.pt")
        except ValueError as error:
            (folder / name / f"{rank}.txt").write_text(str(error))
        accelerator.wait_for_everyone()
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hungry")
    data = write_llava(folder, 24)
    model = run(data, lora(folder / "one", 1, rows_per_step=8), accelerator=Accelerator(cpu=True))
    torch.save(weights(model), folder / "one" / "0.pt")
    on_two_ranks(on_rank, data, folder)
    return folder


@pytest.mark.parametrize("case", ["forward", "backward", "later", "fits"])
def test_all_ranks_halve_where_one_has_too_little(case: str, two_ranks: Path) -> None:
    one, *both = (
        torch.load(two_ranks / name, weights_only=True) for name in ("one/0.pt", f"{case}/0.pt", f"{case}/1.pt")
    )
    for name, weight in one.items():
        assert torch.equal(both[0][name], both[1][name]), name
        torch.testing.assert_close(both[0][name], weight, rtol=1e-4, atol=1e-5)
    for ours, theirs in zip(metrics(two_ranks / "one"), metrics(two_ranks / case), strict=True):
        assert theirs == pytest.approx(ours, rel=1e-5)


def test_all_ranks_stop_where_a_single_row_does_not_fit(two_ranks: Path) -> None:
    for rank in (0, 1):
        assert "out of memory with a single row" in (two_ranks / "hopeless" / f"{rank}.txt").read_text()


def on_rank_of_zero(rank: int, engine: str, data: Path, folder: Path) -> None:
    os.environ["DS_ACCELERATOR"] = "cpu"
    accelerator = start(engine, folder, "no")
    mllm.train.loop.NextToken = hungry(1)  # type: ignore[misc]
    # the words of the rank that was first
    with pytest.raises(
        (ValueError, RankStopped), match=r"out of memory with 2 rows at a time.*rows_per_micro_batch 1 \(the same"
    ):
        run(data, lora(folder / engine, 2, rows_per_step=8), accelerator=accelerator)
    (folder / f"{engine}-{rank}.txt").write_text("stopped")
    torch.distributed.destroy_process_group()


@pytest.mark.recipe
def test_run_under_zero_stops_with_the_setting_to_change(tmp_path: Path) -> None:
    make_ready("zero2", tmp_path)
    on_two_ranks(on_rank_of_zero, "zero2", write_llava(tmp_path, 12), tmp_path)
    assert [(tmp_path / f"zero2-{rank}.txt").read_text() for rank in (0, 1)] == ["stopped", "stopped"]
