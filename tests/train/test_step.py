"""Contract 3: how a global batch is cut up (micro-batches, rows, ranks) changes nothing but rounding."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from torch import multiprocessing

from conftest import make_model, make_processor, make_sample
from mllm.data.collate import collate
from mllm.data.packing import join
from mllm.train.losses import NextToken
from mllm.train.step import optimise
from mllm.train.trainable import LearningRates, choose_trainable, parameter_groups, set_mode
from mllm.types import Batch, Message, Sample

SHAPE = (3, 28, 28)
RATES = LearningRates(connector=1e-2, llm=1e-2)


def samples() -> list[Sample]:
    """Eight of very different supervised length; two are text only, one has two images."""
    made = [make_sample(i, num_images=(1, 0, 2, 1, 1, 1, 0, 1)[i], extra="word " * (i * i)) for i in range(8)]
    made[3].messages.append(Message("user", ["and then?"]))
    made[3].messages.append(Message("assistant", ["no " * 20]))
    return made


def batches(cut: list[list[list[int]]]) -> list[Batch]:
    """Micro-batches of rows of sample numbers."""
    processor, all_samples = make_processor(), samples()
    return [collate([join([processor(all_samples[i]) for i in row], SHAPE) for row in rows], SHAPE) for rows in cut]


def step(accelerator: Accelerator, cut: list[list[list[int]]], max_grad_norm: float = 1e9) -> dict[str, Any]:
    """One SGD step from the same weights: numbers, and the weights it left."""
    model = make_model()
    choose_trainable(model, RATES, None)
    set_mode(model)
    optimizer = torch.optim.SGD(parameter_groups(model, RATES, 0.0))
    objective, optimizer = accelerator.prepare(NextToken(model), optimizer)
    numbers = optimise(accelerator, objective, optimizer, batches(cut), max_grad_norm)
    return {**numbers, "weights": {name: p.detach().clone() for name, p in model.named_parameters()}}


def assert_same(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert one["supervised_tokens"] == other["supervised_tokens"]
    assert one["loss"] == pytest.approx(other["loss"], rel=1e-6)
    assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)
    for name, weight in one["weights"].items():
        torch.testing.assert_close(weight, other["weights"][name], rtol=1e-5, atol=1e-6)


ONE_BY_ONE = [[[i]] for i in range(8)]
CUTS = {
    "batch of 8": [[[i] for i in range(8)]],
    "one packed row": [[list(range(8))]],
    "2 x 4": [[[0], [1], [2], [3]], [[4], [5], [6], [7]]],
    "uneven rows": [[[0, 1, 2]], [[3, 4, 5, 6]], [[7]]],
    "another order": [[[7], [1, 6]], [[0, 2, 5], [4, 3]]],
}


@pytest.mark.parametrize("cut", CUTS)
def test_accumulation_of_8_equals(cut: str) -> None:
    accelerator = Accelerator(cpu=True)
    assert_same(step(accelerator, ONE_BY_ONE), step(accelerator, CUTS[cut]))


def test_loss_is_per_supervised_token_of_the_whole_step() -> None:
    """Not the mean of means: the counts of these samples differ by a factor of ten."""
    accelerator = Accelerator(cpu=True)
    parts = [step(accelerator, [[[i]]]) for i in range(8)]
    counts = [part["supervised_tokens"] for part in parts]
    assert max(counts) > 8 * min(counts)
    by_token = sum(part["loss"] * n for part, n in zip(parts, counts, strict=True)) / sum(counts)
    assert step(accelerator, ONE_BY_ONE)["loss"] == pytest.approx(by_token, rel=1e-6)


def test_gradient_norm_is_told_before_clipping_and_clipping_bounds_the_update() -> None:
    accelerator = Accelerator(cpu=True)
    free, clipped = step(accelerator, ONE_BY_ONE), step(accelerator, ONE_BY_ONE, max_grad_norm=0.01)
    assert free["grad_norm"] == pytest.approx(clipped["grad_norm"])
    start = dict(make_model().named_parameters())
    moved = sum((clipped["weights"][name] - p).square().sum() for name, p in start.items()).sqrt()
    assert float(moved.detach()) <= 1e-2 * 0.01 * 1.01


def test_step_without_any_supervised_token_moves_nothing() -> None:
    accelerator = Accelerator(cpu=True)
    model = make_model()
    choose_trainable(model, RATES, None)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.SGD(parameter_groups(model, RATES, 0.0))
    empty = batches([[[0]]])
    empty[0]["labels"].fill_(-100)
    numbers = optimise(accelerator, NextToken(model), optimizer, empty, 1.0)
    assert (numbers["loss"], numbers["supervised_tokens"], numbers["grad_norm"]) == (0.0, 0, 0.0)
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())


def test_error_of_the_model_names_the_samples_of_the_micro_batch() -> None:
    broken = batches([[[0, 3]]])
    broken[0]["num_images"] = 1
    broken[0]["pixel_values"] = broken[0]["pixel_values"][:1]
    with pytest.raises(ValueError, match=r"made\.json, row 0, made\.json, row 3"):
        optimise(Accelerator(cpu=True), NextToken(make_model()), torch.optim.SGD([torch.zeros(1)]), broken, 1.0)


def on_rank(rank: int, world_size: int, port: int, cuts: list[list[list[list[int]]]], folder: str) -> None:
    """One process of a gloo group; rank 0 leaves what came out."""
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    torch.set_num_threads(1)
    AcceleratorState._reset_state(reset_partial_state=True)  # the parent's, which says one process
    GradientState._reset_state()
    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == world_size
    result = step(accelerator, cuts[rank])
    torch.save(result, Path(folder) / f"{rank}.pt")
    accelerator.end_training()


def free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.mark.parametrize(
    "cuts",
    [
        [[[[0], [2]], [[4], [6]]], [[[1], [3]], [[5], [7]]]],
        [[[[0, 2, 3, 4, 5, 7]]], [[[1, 6]]]],  # the second rank has text only
        [[[[1]], [[6]], [[0, 2]]], [[[3]], [[4]], [[5, 7]]]],
    ],
    ids=["even", "a rank of text only", "three micro-batches"],
)
def test_two_ranks_equal_one(cuts: list[list[list[list[int]]]], tmp_path: Path) -> None:
    multiprocessing.start_processes(on_rank, args=(2, free_port(), cuts, str(tmp_path)), nprocs=2, start_method="fork")
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1)]
    assert all(torch.equal(ranks[0]["weights"][name], w) for name, w in ranks[1]["weights"].items())
    assert_same(step(Accelerator(cpu=True), ONE_BY_ONE), ranks[0])
