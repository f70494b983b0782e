"""Images of any resolution in training: as many visual tokens as their size asks for, the same run on any engine."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file

from conftest import make_model, picture
from engines import make_ready, start, with_text_only
from mllm.data.processor import Processor
from mllm.models.image_newline import ImageNewline
from mllm.train.stage_folder import NEWLINE, save_stage
from mllm.train.trainable import LearningRates, choose_trainable, parameter_groups, parts
from models.test_image_newline import anyres_processor
from runs import assert_same_run, on_two_ranks, run, settings, stage_tensors, write_llava

pytestmark = pytest.mark.recipe
SIZES = [(60, 20), (20, 60), (30, 30), (90, 80), (200, 30)]
RATES = {"learning_rate": LearningRates(connector=1e-2, patterns={"image_newline": 0.5})}


def data_of(folder: Path) -> Path:
    """Pictures of five shapes in every third record, the others are words alone."""
    path = write_llava(folder, 12, turns=1)
    for row in range(12):
        picture(row, SIZES[row % 5]).save(folder / "images" / f"{row}.png")
    return with_text_only(path)


def train(data: Path, folder: Path, accelerator: Accelerator | None = None) -> None:
    config = settings(folder, steps=3, rows_per_micro_batch=1, save_every=2, **RATES)
    processor = anyres_processor()
    model = make_model()
    torch.manual_seed(5)
    assert processor.slots.any_resolution
    model.image_newline = ImageNewline(processor.slots.any_resolution, 32)
    choose_trainable(model, config.learning_rate, None)
    run(data, config, model, accelerator=accelerator, processor=processor)
    save_stage(folder, model, processor, "model: {}\n", accelerator is None or accelerator.is_main_process)


def on_rank(rank: int, engine: str, data: Path, folder: Path) -> None:
    accelerator = start(engine, folder)
    train(data, folder / engine, accelerator)
    accelerator.wait_for_everyone()
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process leaves, and the data beside it."""
    folder = tmp_path_factory.mktemp("anyres")
    data_of(folder)
    train(folder / "data.json", folder / "one")
    return folder


@pytest.mark.parametrize(
    "engine", ["zero3", *(pytest.param(name, marks=pytest.mark.long) for name in ("ddp", "zero2", "fsdp2"))]
)
def test_two_ranks_leave_the_losses_the_newline_and_the_connector_of_one_process(one: Path, engine: str) -> None:
    make_ready(engine, one)
    on_two_ranks(on_rank, engine, one / "data.json", one)
    assert_same_run(one / "one", one / engine)


def test_newline_trains_is_saved_and_the_audit_sees_it_move(one: Path) -> None:
    saved = stage_tensors(one / "one")
    assert f"{NEWLINE}:weight" in saved
    report = json.loads((one / "one" / "audit.json").read_text())
    assert report["end"]["never_moved"] == report["end"]["frozen_but_moved"] == []
    assert report["end"]["declared"] == 5  # two layers of the connector, and the newline
    assert "image_newline.weight" in load_file(one / "one" / "checkpoints" / "step-2" / "trained.safetensors")


def test_newline_has_the_connectors_rate_a_line_of_its_own_and_patterns() -> None:
    model, processor = make_model(), anyres_processor()
    assert isinstance(processor, Processor)
    assert processor.slots.any_resolution
    model.image_newline = ImageNewline(processor.slots.any_resolution, 32)
    choose_trainable(model, RATES["learning_rate"], None)
    told = {part.name: (part.trained, part.rate) for part in parts(model, RATES["learning_rate"])}
    assert told["image_newline"] == (32, 1e-2)
    (group,) = [g for g in parameter_groups(model, RATES["learning_rate"], 0.1) if g["part"] == "image_newline"]
    assert (group["lr"], group["weight_decay"]) == (5e-3, 0.0)
    choose_trainable(model, LearningRates(llm=1e-3), None)
    assert not model.image_newline.weight.requires_grad
