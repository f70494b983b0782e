"""Compiled blocks under each engine that takes them: the run of one process that compiles nothing.

Two ranks are forked and do all runs; some of their micro-batches have no image on one rank, and one on the other.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

from engines import config_that_shards_all, start, with_text_only
from mllm.train.settings import TrainConfig
from mllm.train.tuning import compiling
from runs import LORA, chosen_model, metrics, on_two_ranks, run, settings, write_llava

pytestmark = [pytest.mark.recipe, pytest.mark.long]
ENGINES = ("ddp", "zero2", "fsdp2")
WAYS: dict[str, dict[str, Any]] = {
    "align": {},
    "groups": {"encoder_batch": 3},
    "lora": {**LORA, "gradient_checkpointing": True},
}


PAIRS = [(engine, way) for engine in ENGINES for way in WAYS if (engine, way) != ("fsdp2", "groups")]
"""FSDP2 refuses groups of images: see test_compiling.py."""


def train_config(folder: Path, way: str, compiled: bool) -> TrainConfig:
    return settings(folder, rows_per_micro_batch=1, compile=compiled, **WAYS[way])


def on_rank(rank: int, data: Path, folder: Path) -> None:
    compiling.BACKEND = "aot_eager"
    for engine, way in PAIRS:
        torch._dynamo.reset()
        counters.clear()
        accelerator = start(engine, folder)
        train = train_config(folder / engine / way, way, compiled=True)
        run(data, train, chosen_model(train), accelerator=accelerator)
        (folder / engine / way / f"graphs-{rank}").write_text(str(counters["stats"]["unique_graphs"]))
        accelerator.wait_for_everyone()
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("compiled")
    data = with_text_only(write_llava(folder, 24))
    (folder / "zero2.json").write_text(config_that_shards_all("zero2"))
    for way in WAYS:
        train = train_config(folder / "one" / way, way, compiled=False)
        run(data, train, chosen_model(train))
    on_two_ranks(on_rank, data, folder)
    return folder


@pytest.mark.parametrize(("engine", "way"), PAIRS)
def test_compiled_run_of_two_ranks_has_the_losses_of_one_process(runs: Path, engine: str, way: str) -> None:
    for ours, theirs in zip(metrics(runs / engine / way), metrics(runs / "one" / way), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)
    assert all(int((runs / engine / way / f"graphs-{rank}").read_text()) > 0 for rank in (0, 1))
