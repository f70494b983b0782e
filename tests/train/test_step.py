"""Contract 3: how a global batch is cut up (micro-batches, rows, ranks) changes nothing but rounding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator

from conftest import make_model, make_processor, make_sample
from mllm.data.collate import collate
from mllm.data.packing import join
from mllm.train.losses import NextToken, Reduction
from mllm.train.step import optimise
from mllm.train.trainable import LearningRates, choose_trainable, parameter_groups, set_mode
from mllm.types import Batch, Message, Sample
from runs import on_two_ranks

SHAPE = (3, 28, 28)
RATE = 1.0
"""One step of SGD from weights of about 1: large enough that the rounding of a weight hides no gradient."""
RATES = LearningRates(connector=RATE, llm=RATE)


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


def step(
    accelerator: Accelerator, cut: list[list[list[int]]], max_grad_norm: float = 1e9, reduction: Reduction = "token"
) -> dict[str, Any]:
    """One SGD step from the same weights: numbers, and the weights it left."""
    model = make_model()
    choose_trainable(model, RATES, None)
    set_mode(model)
    optimizer = torch.optim.SGD(parameter_groups(model, RATES, 0.0))
    objective, optimizer = accelerator.prepare(NextToken(model), optimizer)
    numbers = optimise(accelerator, objective, optimizer, batches(cut), max_grad_norm, reduction)
    return {**numbers, "weights": {name: p.detach().clone() for name, p in model.named_parameters()}}


def assert_same(one: dict[str, Any], other: dict[str, Any]) -> None:
    """Plain SGD at one rate: equal steps are equal gradients."""
    assert one["supervised_tokens"] == other["supervised_tokens"]
    assert one["loss"] == pytest.approx(other["loss"], rel=1e-6)
    assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-5)
    apart = sum((weight - other["weights"][name]).square().sum() for name, weight in one["weights"].items())
    assert float(apart.sqrt()) <= 1e-5 * RATE * one["grad_norm"]


ONE_BY_ONE = [[[i]] for i in range(8)]
SPLITS: dict[str, list[list[list[list[int]]]]] = {  # per rank its micro-batches of rows of samples
    "8 x 1": [ONE_BY_ONE],
    "1 x 8": [[[[i] for i in range(8)]]],
    "2 x 4": [[[[0], [1], [2], [3]], [[4], [5], [6], [7]]]],
    "4 x 2": [[[[0], [1]], [[2], [3]], [[4], [5]], [[6], [7]]]],
    "one packed row": [[[list(range(8))]]],
    "two packed rows": [[[[0, 1, 2, 3], [4, 5, 6, 7]]]],
    "uneven packed rows": [[[[0, 1, 2]], [[3, 4, 5, 6]], [[7]]]],
    "another order": [[[[7], [1, 6]], [[0, 2, 5], [4, 3]]]],
    "2 ranks, 2 x 2": [[[[0], [2]], [[4], [6]]], [[[1], [3]], [[5], [7]]]],
    "2 ranks, 4 x 1": [[[[0]], [[2]], [[4]], [[6]]], [[[1]], [[3]], [[5]], [[7]]]],
    "2 ranks, one of text only": [[[[0, 2, 3, 4, 5, 7]]], [[[1, 6]]]],
    "2 ranks, 3 packed": [[[[1]], [[6]], [[0, 2]]], [[[3]], [[4]], [[5, 7]]]],
}
"""Twelve ways to cut the same eight samples."""
REDUCTIONS: list[Reduction] = ["token", "sample", "sqrt"]


@pytest.fixture(scope="module")
def whole() -> dict[str, dict[str, Any]]:
    """The step over all eight samples, one at a time, for each reduction."""
    return {reduction: step(Accelerator(cpu=True), ONE_BY_ONE, reduction=reduction) for reduction in REDUCTIONS}


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("split", [name for name, ranks in SPLITS.items() if len(ranks) == 1])
def test_step_is_the_same_on_one_rank_cut(split: str, reduction: Reduction, whole: dict[str, Any]) -> None:
    assert_same(whole[reduction], step(Accelerator(cpu=True), SPLITS[split][0], reduction=reduction))


def test_reductions_differ_where_samples_differ_in_length(whole: dict[str, Any]) -> None:
    losses = [whole[reduction]["loss"] for reduction in REDUCTIONS]
    assert min(abs(losses[i] - losses[j]) for i, j in ((0, 1), (0, 2), (1, 2))) > 1e-3


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
    assert float(moved.detach()) <= RATE * 0.01 * 1.01


def test_norm_of_0_clips_nothing() -> None:
    accelerator = Accelerator(cpu=True)
    assert_same(step(accelerator, ONE_BY_ONE), step(accelerator, ONE_BY_ONE, max_grad_norm=0))


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


def on_rank(rank: int, folder: Path) -> None:
    """One process of a gloo group: every split for two, every reduction."""
    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == 2
    results = {
        (name, reduction): step(accelerator, ranks[rank], reduction=reduction)
        for name, ranks in SPLITS.items()
        for reduction in REDUCTIONS
        if len(ranks) == 2
    }
    torch.save(results, folder / f"{rank}.pt")
    accelerator.end_training()


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[Any, Any]]:
    """What each of two ranks holds after its steps."""
    folder = tmp_path_factory.mktemp("ranks")
    on_two_ranks(on_rank, folder)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in (0, 1)]


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("split", [name for name, ranks in SPLITS.items() if len(ranks) == 2])
def test_step_is_the_same_on_two_ranks(
    split: str, reduction: Reduction, whole: dict[str, Any], two_ranks: list[dict[Any, Any]]
) -> None:
    first, second = (rank[split, reduction] for rank in two_ranks)
    assert all(torch.equal(first["weights"][name], weight) for name, weight in second["weights"].items())
    assert_same(whole[reduction], first)
