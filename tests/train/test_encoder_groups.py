"""A frozen encoder takes the images of all micro-batches of a step together, by itself where that changes nothing."""

from __future__ import annotations

import json
from math import ceil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator

from conftest import make_model, picture
from mllm.config import parse
from mllm.data.loader import DataConfig
from mllm.models.image_groups import Groups, StepImages
from mllm.models.multimodal import MultimodalLM
from mllm.native_aspect import NativeAspect
from mllm.train import engine
from mllm.train.settings import TrainConfig
from mllm.train.trainable import LearningRates
from mllm.train.tuning import encoder_groups
from runs import assert_same_run, chosen_model, metrics, run, settings, write_llava

FOUR: dict[str, Any] = {"rows_per_step": 4, "rows_per_micro_batch": 1, "steps": 3, "audit": "off"}
"""Four micro-batches an update."""
IMAGES = (1, 0, 2, 1, 3)


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Samples of up to three images, long enough that none shares its row."""
    folder = tmp_path_factory.mktemp("mixed")
    written = []
    for number in range(15):
        pictures = [f"{number}-{n}.png" for n in range(IMAGES[number % 5])]
        for n, name in enumerate(pictures):
            picture(7 * number + n).save(folder / name)
        question = "<image>\n" * len(pictures) + "what? " * (20 - 3 * len(pictures))
        turns = [{"from": "human", "value": question}, {"from": "gpt", "value": f"it is {number}"}]
        written.append({"id": f"r{number}", "image": pictures, "conversations": turns})
    (folder / "data.json").write_text(json.dumps(written))
    return folder / "data.json"


def calls(model: MultimodalLM) -> list[int]:
    """Filled while a run goes on: the images of each call of the encoder."""
    seen: list[int] = []
    model.vision_encoder.register_forward_pre_hook(lambda _, given: seen.append(len(given[0])))
    return seen


def calls_of(data: Path, train: TrainConfig) -> list[int]:
    seen = calls(model := chosen_model(train))
    run(data, train, model)
    return seen[1:]  # by the first one the clock counts the operations of an image


def test_an_update_of_four_micro_batches_calls_the_encoder_once_a_group(
    mixed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one_by_one = calls_of(mixed, settings(tmp_path / "off", encoder_batch=None, **FOUR))
    assert len(one_by_one) == 3 * 4
    together = calls_of(mixed, settings(tmp_path / "auto", **FOUR))
    images = [line[0] for line in metrics(tmp_path / "auto", "images")]
    assert together == images
    assert max(images) > 3
    monkeypatch.setattr(encoder_groups, "ON_CPU", 3 * 4)  # three images of four patches
    in_threes = calls_of(mixed, settings(tmp_path / "threes", **FOUR))
    assert len(in_threes) == sum(ceil(count / 3) for count in images)
    assert set(in_threes) <= {2, 3}, "of the images of a step none is left alone"
    for name in ("auto", "threes"):
        assert_same_run(tmp_path / "off", tmp_path / name)


def test_a_step_of_one_micro_batch_is_the_one_without_groups_bit_for_bit(mixed: Path, tmp_path: Path) -> None:
    one = {**FOUR, "rows_per_micro_batch": 4}
    seen = [calls_of(mixed, settings(tmp_path / str(how), encoder_batch=how, **one)) for how in ("auto", None)]
    assert seen[0] == seen[1]
    assert metrics(tmp_path / "auto") == metrics(tmp_path / "None")


def test_groups_that_nobody_asked_for_are_for_frozen_whole_encoders_that_keep_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    accelerator, model = Accelerator(cpu=True), make_model().requires_grad_(False)

    def chosen(**changes: Any) -> Groups | None:
        return encoder_groups.chosen(accelerator, model, settings(tmp_path, **changes))

    assert chosen() == Groups(encoder_groups.ON_CPU // 4, filled=False)
    assert chosen(encoder_batch=5) == Groups(5)
    assert chosen(encoder_batch=None) is None
    assert chosen(encoder_batch=False) is None
    assert chosen(feature_cache=1.0) is None
    assert chosen(feature_cache_dir=tmp_path / "features") is None
    model.native_aspect = NativeAspect(28, 14)
    assert chosen() is None
    model.native_aspect = None
    next(model.vision_encoder.parameters()).requires_grad_(True)
    assert chosen() is None
    model.requires_grad_(False)
    monkeypatch.setattr("mllm.train.engines.zero.stage", lambda _: 3)
    assert chosen() is None
    encoder_groups.check(accelerator, settings(tmp_path), DataConfig(image_fit="aspect"))  # not asked for, not refused
    with pytest.raises(ValueError, match=r"train\.encoder_batch where the encoder is sharded"):
        encoder_groups.check(accelerator, settings(tmp_path, encoder_batch=4), DataConfig())


def test_an_encoder_that_trains_takes_the_images_of_each_micro_batch(tmp_path: Path) -> None:
    train = settings(tmp_path / "run", **{**FOUR, "learning_rate": LearningRates(connector=1e-2, vision_encoder=1e-3)})
    assert len(calls_of(write_llava(tmp_path, 8), train)) == 3 * 4


class Hungry(torch.nn.Module):
    """Memory for so many images at a time."""

    def __init__(self, model: MultimodalLM, fits: int) -> None:
        super().__init__()
        model.vision_encoder.register_forward_pre_hook(self.look)
        self.fits = fits

    def look(self, _: Any, given: Any) -> None:
        if len(given[0]) > self.fits:
            raise torch.OutOfMemoryError("made up")


def test_a_group_that_memory_has_no_room_for_is_halved_and_rows_stay_together(
    mixed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(mixed, settings(tmp_path / "plain", **FOUR))
    train = settings(tmp_path / "hungry", **FOUR)
    model = chosen_model(train)
    Hungry(model, fits=3)
    seen = calls(model)
    run(mixed, train, model)
    assert_same_run(tmp_path / "plain", tmp_path / "hungry")
    assert max(seen) <= 3
    assert model.encoder_batch is not None
    assert 1 < model.encoder_batch.size <= 3
    assert "out of memory" not in capsys.readouterr().err


@pytest.mark.parametrize("groups", [Groups(8), Groups(8, filled=False)])
def test_one_image_that_does_not_fit_is_an_error(groups: Groups) -> None:
    model = make_model()
    Hungry(model, fits=0)
    images = StepImages(model.vision_encoder, [torch.zeros(5, 3, 28, 28)], groups, lambda tensor: tensor)
    with pytest.raises(torch.OutOfMemoryError):
        images.take(5)


@pytest.mark.parametrize(("given", "means"), [("48", 48), ("auto", "auto"), ("off", False), ("null", None)])
def test_a_flag_gives_a_number_or_leaves_it_to_the_run_or_switches_it_off(given: str, means: Any) -> None:
    parsed = parse(["--config", "recipes/llava15/pretrain.yaml", "--train.encoder_batch", given])
    assert repr(parsed.train.encoder_batch) == repr(means)


@pytest.mark.parametrize("asked", [True, False])
def test_under_deepspeed_the_encoder_runs_in_the_precision_of_the_forward_pass(asked: bool) -> None:
    plugin = SimpleNamespace(zero_stage=2, deepspeed_config={"torch_autocast": {"enabled": asked}})
    accelerator: Any = SimpleNamespace(state=SimpleNamespace(deepspeed_plugin=plugin), device=torch.device("cpu"))
    with engine.autocast(accelerator):
        assert torch.is_autocast_enabled("cpu") is asked
