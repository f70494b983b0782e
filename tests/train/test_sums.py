"""The losses of the sources of a mixture: parts of the one loss that is trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator

from conftest import make_model, make_processor, make_sample, write_llava
from mllm.data.collate import collate
from mllm.data.formats.captions import CaptionsSource
from mllm.data.formats.llava import LlavaSource
from mllm.data.formats.source import Source, labels
from mllm.data.index import build_index
from mllm.data.loader import DataConfig
from mllm.data.packing import join
from mllm.data.streams.batches import open_stream
from mllm.train.loop import fit
from mllm.train.losses import NextToken, model_inputs, num_supervised, owners
from mllm.train.route import make_plan
from mllm.train.sums import Sums
from mllm.types import Batch
from runs import chosen_model, on_two_ranks, settings

SHAPE = (3, 28, 28)
SOURCE = [0, 1, 1, 2, 0, 1, 2, 2]
"""Of each of eight samples; they differ in length, and some have no image or two."""


def batch(rows: list[list[int]]) -> Batch:
    processor, made = make_processor(), []
    for row in rows:
        examples = [processor(make_sample(i, num_images=i % 3, turns=1 + i % 2, extra="word " * i)) for i in row]
        for number, example in zip(row, examples, strict=True):
            example.source = SOURCE[number]
        made.append(join(examples, SHAPE))
    return collate(made, SHAPE)


def numbers(cut: list[list[list[int]]]) -> dict[str, Any]:
    """What a step over these micro-batches tells."""
    objective, sums = NextToken(make_model()), Sums(["a", "b", "c"])
    for rows in cut:
        micro = batch(rows)
        sums.add(micro, *objective(**model_inputs(micro, torch.device("cpu")), each=True))
    return sums.numbers(sums.values(), 1.0)


CUTS = {
    "one by one": [[[i]] for i in range(8)],
    "padded rows": [[[0], [1], [2], [3]], [[4], [5], [6], [7]]],
    "packed rows of uneven length": [[[0, 1, 2, 3, 4], [5]], [[6, 7]]],
}


@pytest.mark.parametrize("cut", list(CUTS))
def test_loss_of_a_source_is_the_loss_of_its_samples_alone(cut: str) -> None:
    told = numbers(CUTS[cut])
    found, summed = told["source_loss"], 0.0
    for number, name in enumerate("abc"):
        alone = batch([[i] for i in range(8) if SOURCE[i] == number])
        loss = float(NextToken(make_model())(**model_inputs(alone, torch.device("cpu"))).detach())
        assert found[name] == pytest.approx(loss / num_supervised(alone), rel=1e-5)
        summed += found[name] * num_supervised(alone)
    assert summed == pytest.approx(told["loss"], rel=1e-6)


def test_a_source_without_tokens_in_the_step_is_not_told() -> None:
    assert numbers([[[1, 2]]])["source_loss"].keys() == {"b"}


def test_owner_of_a_token_is_its_sample_whatever_stands_beside_it() -> None:
    packed = batch([[0, 1, 2], [3], [4, 5]])
    found = owners(packed).bincount().tolist()
    assert found == [num_supervised(batch([[i]])) for i in range(6)]


def mixed(folder: Path) -> list[Source]:
    """Two sources of one file name, and captions."""
    sources: list[Source] = []
    for name, records in (("one", 6), ("other", 4)):
        (folder / name).mkdir(parents=True)
        sources.append(LlavaSource(path=write_llava(folder / name, records)))
    lines = [{"image": f"one/images/{i}.png", "caption": f"number {i}"} for i in range(5)]
    (folder / "captions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return [*sources, CaptionsSource(path=folder / "captions.jsonl")]


def train(folder: Path, sources: list[Source], stream: bool = False, accelerator: Accelerator | None = None) -> None:
    config = settings(folder, steps=3, rows_per_micro_batch=1)
    data = DataConfig(sources, seq_length=96, num_workers=0, stream=stream)  # type: ignore[arg-type]
    processor = make_processor()
    index = open_stream(data, processor, 0) if stream else build_index(sources, processor, 96, progress=False)
    folder.mkdir(parents=True, exist_ok=True)
    plan = make_plan(index, data, config)
    fit(accelerator or Accelerator(cpu=True), chosen_model(config), processor, index, plan, data, config)


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def on_rank(rank: int, folder: Path, sources: list[Source]) -> None:
    train(folder / "two", sources, accelerator=Accelerator(cpu=True))
    torch.distributed.destroy_process_group()


def test_losses_of_the_sources_are_those_of_one_process_on_two_ranks(tmp_path: Path) -> None:
    sources = mixed(tmp_path)
    train(tmp_path / "one-rank", sources)
    on_two_ranks(on_rank, tmp_path, sources)
    for one, two in zip(lines(tmp_path / "one-rank"), lines(tmp_path / "two"), strict=True):
        assert one["source_loss"] == pytest.approx(two["source_loss"], rel=1e-5)
        assert (one["images"], one["supervised_tokens"]) == (two["images"], two["supervised_tokens"])
        assert one["images"] == one["samples"]  # each of these samples has one


@pytest.mark.parametrize("stream", [False, True], ids=["index", "stream"])
def test_sources_are_told_by_name_and_enclose_the_loss(tmp_path: Path, stream: bool) -> None:
    sources = mixed(tmp_path)
    train(tmp_path / "out", sources, stream)
    told = lines(tmp_path / "out")
    assert {name for line in told for name in line["source_loss"]} == {"data", "data-2", "captions"}
    for line in told:
        assert min(line["source_loss"].values()) - 1e-9 <= line["loss"] <= max(line["source_loss"].values()) + 1e-9


def test_names_are_told_apart_and_say_where_a_glob_lies() -> None:
    paths = ["a/data.json", "b/data.json", "shards/*.tar", "hub:OWNER/NAME"]
    sources = [LlavaSource(path=path) for path in paths]
    sources[3].subset = "ai2d"
    assert labels(sources) == ["data", "data-2", "shards", "NAME:ai2d"]
