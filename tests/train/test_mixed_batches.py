"""Micro-batches of any kind meet in one step on different ranks: nothing hangs, the losses are those of one process."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from conftest import make_processor
from engines import config_that_shards_all
from mixed import WHAT, on_rank, train_mixed, write_mixed
from mllm.data.formats.llava import LlavaSource
from mllm.data.index import Index, build_index
from mllm.data.loader import DataConfig, PlannedBatches, Share
from mllm.data.streams.batches import StreamedBatches, open_stream
from mllm.train.route import make_plan
from runs import SEQ_LENGTH, metrics, on_two_ranks, settings, write_llava

STEPS = {"align": 12, "lora": 5, "full": 5}
ENGINES = ["ddp", "zero2", "zero3"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("deepspeed", reason="deepspeed is not installed: pip install 'mllm[deepspeed]'")
    folder = tmp_path_factory.mktemp("mixed")
    data = write_mixed(folder / "data", 40)
    train_mixed(data, folder / "one", STEPS)
    for engine in ENGINES:
        if engine != "ddp":
            (folder / f"{engine}.json").write_text(config_that_shards_all(engine))
        on_two_ranks(on_rank, engine, data, folder, STEPS)
    return folder


@pytest.mark.recipe
@pytest.mark.parametrize("what", WHAT)
@pytest.mark.parametrize("engine", ENGINES)
def test_two_ranks_of_any_mixture_leave_the_losses_of_one_process(runs: Path, engine: str, what: str) -> None:
    names = ("step", "loss", "supervised_tokens", "images", "skipped")
    one, two = (metrics(runs / folder / what, *names) for folder in ("one", engine))
    assert len(one) == STEPS[what]
    for ours, theirs in zip(one, two, strict=True):
        assert theirs == pytest.approx(ours, rel=1e-4)


@pytest.mark.recipe
def test_these_runs_meet_every_kind_of_micro_batch(runs: Path) -> None:
    """Else the test above would show little: steps in which one rank has images and the other has none, and holes."""
    data, train = runs / "data" / "data.json", settings(runs / "one", rows_per_step=4, rows_per_micro_batch=1)
    config = DataConfig([LlavaSource(path=data)], seq_length=SEQ_LENGTH, packing=False)
    index = indexed(config)
    plan = make_plan(index, config, train)
    ranks = [PlannedBatches(index, plan, make_processor(), Share(rank, 2, 1)) for rank in (0, 1)]
    met = [tuple(kind(ranks[rank][rows]) for rank, rows in enumerate(pair)) for pair in zip(*map(all_items, ranks))]  # noqa: B905
    assert {"text", "image", "images", "hole"} <= {one for pair in met for one in pair}
    assert sum("text" in pair and len(set(pair)) == 2 for pair in met) >= 5
    assert any("hole" in pair and len(set(pair)) == 2 for pair in met)


def all_items(dataset: PlannedBatches) -> list[Any]:
    return list(dataset.items(0, STEPS["align"]))


def kind(batch: Any) -> str:
    if batch["faults"]:
        assert (batch["labels"] == -100).all()
        return "hole"
    return ("text", "image", "images")[min(2, batch["num_images"])]


# ---------------------------------------------------------------- the plan deals evenly


def indexed(config: DataConfig) -> Index:
    return build_index(config.sources, make_processor(), SEQ_LENGTH, progress=False)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 6])
@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("stream", [True, False])
def test_every_rank_gets_the_same_number_of_batches_and_every_row_once(
    world_size: int, packing: bool, stream: bool, tmp_path: Path
) -> None:
    """24 rows a step for 3.1 passes over 31 samples: no step ends where a pass over the samples does."""
    processor, steps = make_processor(), 2 if packing else 4
    train = settings(tmp_path / "run", rows_per_step=24, rows_per_micro_batch=2)
    config = DataConfig(
        [LlavaSource(path=write_llava(tmp_path, 31))], seq_length=SEQ_LENGTH, stream=stream, packing=packing
    )
    shares: list[list[list[list[str]]]] = []
    for share in (Share(rank, world_size, 2) for rank in range(world_size)):
        index: Any = open_stream(config, processor, 0) if stream else indexed(config)
        plan: Any = make_plan(index, config, train)
        dataset: Any = (
            StreamedBatches(plan, processor, share) if stream else PlannedBatches(index, plan, processor, share)
        )
        shares.append([[list(dataset.names([row])) for row in item] for item in dataset.items(0, steps)])
    assert {len(share) for share in shares} == {24 * steps // (2 * world_size)}
    assert {len(micro_batch) for share in shares for micro_batch in share} == {2}
    dealt = [row for share in shares for micro_batch in share for row in micro_batch]
    assert len(dealt) == steps * 24
    times = [sum(row.count(f"r{i}") for row in dealt) for i in range(31)]
    assert max(times) - min(times) <= 2  # the last pass is not whole, and a packer holds some back


def test_no_batch_is_lost_or_dealt_twice_between_neighbouring_steps(tmp_path: Path) -> None:
    data = write_llava(tmp_path, 31)
    config = DataConfig([LlavaSource(path=data)], seq_length=SEQ_LENGTH, packing=False)
    index = indexed(config)
    plan = make_plan(index, config, settings(tmp_path / "run", rows_per_step=4))
    epochs = [row[0] for step in range(31) for row in plan.rows(step)]  # type: ignore[union-attr]
    assert [sorted(epochs[first:last]) for first, last in pairwise(range(0, 125, 31))] == [list(range(31))] * 4


def test_loader_is_not_one_that_accelerate_would_deal_again() -> None:
    """accelerate's samplers repeat or drop batches where they do not divide; ours are dealt by the plan alone."""
    import mllm.train.engine
    import mllm.train.loop

    for module in (mllm.train.loop, mllm.train.engine):
        text = Path(module.__file__ or "").read_text()
        assert "prepare_data_loader" not in text
        assert "skip_first_batches" not in text
