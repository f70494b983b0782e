"""Images that keep their aspect (`data.image_fit: aspect`) in training: the same run on any engine, on two ranks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from engines import make_ready, start
from mllm.train.stage_folder import save_stage
from mllm.train.trainable import LearningRates, choose_trainable
from runs import assert_same_run, on_two_ranks, run, settings, stage_tensors
from test_any_resolution_runs import data_of
from test_native_aspect import built, write_parts

pytestmark = pytest.mark.recipe
RATES = LearningRates(connector=1e-2, llm=1e-3, vision_encoder=1e-3)


def train(folder: Path, out: Path, accelerator: Accelerator | None = None) -> None:
    """All three parts, a row a micro-batch: on two ranks one often has words alone while the other has images."""
    config = settings(out, steps=3, rows_per_micro_batch=1, learning_rate=RATES)
    processor, model = built(folder)
    assert processor.slots.native_aspect
    torch.manual_seed(5)
    choose_trainable(model, config.learning_rate, None)
    run(folder / "data.json", config, model, accelerator=accelerator, processor=processor)
    save_stage(out, model, processor, "model: {}\n", accelerator is None or accelerator.is_main_process)


def on_rank(rank: int, engine: str, folder: Path) -> None:
    accelerator = start(engine, folder)
    train(folder, folder / engine, accelerator)
    accelerator.wait_for_everyone()
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process leaves, beside parts and data."""
    folder = write_parts(tmp_path_factory.mktemp("aspect"))
    data_of(folder)
    train(folder, folder / "one")
    return folder


@pytest.mark.parametrize(
    "engine", ["ddp", *(pytest.param(name, marks=pytest.mark.long) for name in ("zero2", "zero3", "fsdp2"))]
)
def test_two_ranks_leave_the_losses_and_all_three_parts_of_one_process(one: Path, engine: str) -> None:
    make_ready(engine, one)
    assert {name.partition(":")[0] for name in stage_tensors(one / "one")} == {
        *("connector.safetensors", "llm.safetensors", "vision_encoder.safetensors")
    }
    on_two_ranks(on_rank, engine, one)
    assert_same_run(one / "one", one / engine)
