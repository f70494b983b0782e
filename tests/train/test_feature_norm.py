"""The encoder's final norm, called where its tap lies, also where its weights are shards of two ranks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from conftest import make_clip, make_image_processor, make_processor
from engines import make_ready, start, with_text_only
from mllm.models.vision_encoder import VisionEncoder, final_norm
from mllm.train.stage_folder import save_stage
from mllm.train.trainable import LearningRates, choose_trainable
from mllm.types import Normalisation
from runs import assert_same_run, make_model, on_two_ranks, run, settings, stage_tensors, write_llava

pytestmark = [pytest.mark.recipe, pytest.mark.long]
RATES = LearningRates(connector=1e-2, llm=1e-3, vision_encoder=1e-3)


def train(data: Path, folder: Path, accelerator: Accelerator | None = None) -> None:
    """All parts train; recomputed in the backward pass, in which the tap comes by a second time."""
    config = settings(folder, rows_per_micro_batch=1, learning_rate=RATES, gradient_checkpointing=True)
    model = make_model()
    normalisation = Normalisation.of(make_image_processor())
    model.vision_encoder = VisionEncoder(make_clip().vision_model, -2, normalisation, feature_norm=True)
    choose_trainable(model, config.learning_rate, None)
    run(data, config, model, accelerator=accelerator)
    save_stage(folder, model, make_processor(), "", accelerator is None or accelerator.is_main_process)


def on_rank(rank: int, engine: str, data: Path, folder: Path) -> None:
    train(data, folder / engine, start(engine, folder))
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("engine", ["ddp", "zero3", "fsdp2"])
def test_two_ranks_train_the_norm_as_one_process_does(engine: str, tmp_path: Path) -> None:
    make_ready(engine, tmp_path)
    data = with_text_only(write_llava(tmp_path, 12))
    train(data, tmp_path / "one")
    on_two_ranks(on_rank, engine, data, tmp_path)
    assert_same_run(tmp_path / "one", tmp_path / engine)
    (trained,) = [
        tensor for name, tensor in stage_tensors(tmp_path / engine).items() if "post_layernorm.weight" in name
    ]
    assert not torch.equal(trained, final_norm(make_clip().vision_model).weight)
