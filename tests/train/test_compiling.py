"""Compiled blocks say what the plain ones say, and nothing is compiled anew while samples, images and rows change.

Here blocks are traced and run by `aot_eager`, which is quick; `test-long` tries the code that inductor writes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

from conftest import make_model, picture
from mllm.data.loader import DataConfig
from mllm.models.image_groups import Groups, StepImages, in_groups
from mllm.train.loop import optimise
from mllm.train.trainable import LearningRates
from mllm.train.tuning import compiling
from runs import LORA, chosen_model, metrics, run, settings

STEPS = 4


@pytest.fixture(autouse=True)
def quickly(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(compiling, "BACKEND", "aot_eager")
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Samples of one image, of none, of two. Those of none fill a row, so that micro-batches have no image at all."""
    folder = tmp_path_factory.mktemp("mixed")
    written = []
    for number in range(40):
        pictures = [f"{number}-{n}.png" for n in range((1, 0, 2)[number % 3])]
        for name in pictures:
            picture(number).save(folder / name)
        question = "<image>\n" * len(pictures) + "what? " * (1 + number % 5 if pictures else 22)
        turns = [{"from": "human", "value": question}, {"from": "gpt", "value": f"it is {number}"}]
        written.append({"id": f"r{number}", "image": pictures, "conversations": turns})
    (folder / "data.json").write_text(json.dumps(written))
    return folder / "data.json"


def graphs_by_step(monkeypatch: pytest.MonkeyPatch) -> tuple[list[int], set[int]]:
    """Filled while a run goes on: how many graphs there are after each step, the images that micro-batches have."""
    seen, images = [], set()

    def counted(accelerator: Any, objective: Any, optimizer: Any, block: Any, **named: Any) -> dict[str, Any]:
        numbers = optimise(accelerator, objective, optimizer, block, **named)
        seen.append(counters["stats"]["unique_graphs"])
        images.update(batch["num_images"] for batch in block)
        return numbers

    monkeypatch.setattr("mllm.train.loop.optimise", counted)
    return seen, images


WAYS: dict[str, dict[str, Any]] = {
    "align": {"eval_every": 1},
    "lora, checkpointing": {**LORA, "gradient_checkpointing": True},
    "all three": {"learning_rate": LearningRates(connector=1e-2, llm=1e-3, vision_encoder=1e-3)},
}


@pytest.mark.parametrize("way", ["align", "lora, checkpointing", pytest.param("all three", marks=pytest.mark.long)])
def test_compiled_run_has_the_same_losses_and_compiles_nothing_after_its_first_step(
    way: str, mixed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    common = {"steps": STEPS, "rows_per_step": 3, "rows_per_micro_batch": 1, **WAYS[way]}
    plain, compiled = (settings(tmp_path / name, compile=name == "compiled", **common) for name in ("no", "compiled"))
    held_out = {"held_out": 5} if way == "align" else {}
    run(mixed, plain, chosen_model(plain), **held_out)
    assert not counters["stats"]
    seen, images = graphs_by_step(monkeypatch)
    run(mixed, compiled, chosen_model(compiled), **held_out)
    for ours, theirs in zip(metrics(compiled.output_dir), metrics(plain.output_dir), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)
    assert {0, 1} < images, "micro-batches must differ for this to say anything"
    assert seen[0] > 0
    assert seen[1:] == [seen[1]] * (STEPS - 1), "only the held-out losses behind the first step compile more"
    assert seen[0] == seen[1] or held_out
    assert not counters["graph_break"]


@pytest.mark.long
def test_code_of_inductor_has_the_same_losses(mixed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling, "BACKEND", "inductor")
    plain, compiled = (settings(tmp_path / name, compile=name == "yes") for name in ("no", "yes"))
    for train in (plain, compiled):
        run(mixed, train, chosen_model(train))
    for ours, theirs in zip(metrics(compiled.output_dir), metrics(plain.output_dir), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)
    assert counters["stats"]["unique_graphs"] > 0


def test_images_in_groups_over_a_step_are_those_of_each_micro_batch(mixed: Path, tmp_path: Path) -> None:
    common = {"steps": STEPS, "rows_per_step": 3, "rows_per_micro_batch": 1}
    losses = []
    for size in (None, 1, 2, 7):
        train = settings(tmp_path / str(size), encoder_batch=size, **common)
        run(mixed, train, chosen_model(train))
        losses.append(metrics(train.output_dir))
    for other in losses[1:]:
        for ours, theirs in zip(other, losses[0], strict=True):
            assert ours == pytest.approx(theirs, rel=1e-5)


def test_only_the_last_group_of_a_step_has_blank_images_in_it() -> None:
    encoder = make_model().vision_encoder.eval()
    pixels = torch.rand(9, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    calls: list[int] = []
    encoder.register_forward_pre_hook(lambda _m, given: calls.append(int(given[0].flatten(1).any(1).sum())))
    images = StepImages(encoder, pixels.split([2, 5, 1, 1]), Groups(4), lambda tensor: tensor)
    found = torch.cat([images.take(count) for count in (2, 5, 1, 1)])
    assert calls == [4, 4, 1]
    torch.testing.assert_close(found, in_groups(encoder, pixels, 9), rtol=1e-4, atol=1e-5)
    assert calls[3:] == [9]


def test_what_cannot_be_compiled_is_refused_with_the_setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from accelerate import Accelerator

    accelerator, train = Accelerator(cpu=True), settings(tmp_path, compile=True)
    with pytest.raises(ValueError, match=r"train\.compile without data\.packing"):
        compiling.check(accelerator, train, DataConfig(packing=False), None)
    with pytest.raises(ValueError, match=r"model\.quantisation nf4"):
        compiling.check(accelerator, train, DataConfig(), "nf4")
    monkeypatch.setattr("mllm.train.engines.zero.stage", lambda _: 3)
    with pytest.raises(ValueError, match=r"ZeRO stage 3.*ZeRO stage 2 or FSDP2"):
        compiling.check(accelerator, train, DataConfig(), None)
    with pytest.raises(ValueError, match=r"train\.encoder_batch where the encoder is sharded"):
        compiling.check(accelerator, settings(tmp_path, encoder_batch=4), DataConfig(), None)
