"""torch's FSDP2 on two CPU processes: the same run as one process, and checkpoints that other engines go on from.

Two ranks are forked and do all runs; the tests compare what they left.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from accelerate import Accelerator

from conftest import make_processor
from engines import CONFIGS, at_step_2, make_ready, start, with_text_only
from mllm.models.multimodal import MultimodalLM
from mllm.train import engine as engines
from mllm.train.engines import fsdp
from mllm.train.settings import TrainConfig
from mllm.train.stage_folder import save_stage
from mllm.train.trainable import LearningRates
from runs import LORA, assert_same_run, chosen_model, metrics, on_two_ranks, run, settings, stage_tensors, write_llava

pytestmark = pytest.mark.recipe

WHAT: dict[str, dict[str, Any]] = {
    "align": {},
    "lora": {**LORA, "gradient_checkpointing": True},
    "full": {"learning_rate": LearningRates(connector=1e-2, llm=1e-3, vision_encoder=1e-3)},
    "bf16": {**LORA, "mixed_precision": "bf16"},
}
EXACT = ["align", "lora", "full"]
HALF = torch.bfloat16
"""Of the frozen weights of `bf16`, as `model.dtype: bfloat16` reads them; what trains beside them is float32."""


def train_config(folder: Path, what: str) -> TrainConfig:
    """Four steps of two micro-batches on each of two ranks; a norm that clips; checkpoints after each second step."""
    plain = {"rows_per_micro_batch": 1, "max_grad_norm": 0.5, "save_every": 2, "weight_decay": 0.1}
    return settings(folder, **{**plain, **WHAT[what]})


def train(
    data: Path, folder: Path, what: str, accelerator: Accelerator | None = None, resume: bool = False
) -> MultimodalLM:
    """A run and the stage that it leaves; `full` has tied embeddings, `bf16` frozen weights in bfloat16."""
    config = train_config(folder, what)
    model = chosen_model(config, tie_word_embeddings=what == "full")
    if what == "bf16":
        for weight in model.parameters():
            if not weight.requires_grad:
                weight.data = weight.data.to(HALF)
    run(data, config, model, resume, accelerator)
    save_stage(folder, model, make_processor(), "model: {}\n", accelerator is None or accelerator.is_main_process)
    return model


def on_rank(rank: int, data: Path, folder: Path) -> None:
    """One of two processes: each run, each run resumed, and what one process began."""
    for what in WHAT:
        begun = {f"{what}-resumed": folder / "fsdp2" / what}
        if what in EXACT:
            begun[f"{what}-from-one"] = folder / "one" / what
        for name in [what, *begun]:
            accelerator = start("fsdp2", folder, WHAT[what].get("mixed_precision", "no"))
            here = folder / "fsdp2" / name
            if name in begun and accelerator.is_main_process:
                at_step_2(begun[name], here)
            accelerator.wait_for_everyone()
            model = train(data, here, what, accelerator, resume=name in begun)
            (here / f"rank-{rank}.json").write_text(json.dumps(what_ran(accelerator, model)))
            accelerator.wait_for_everyone()
    torch.distributed.destroy_process_group()


def zero3_on_rank(rank: int, data: Path, folder: Path) -> None:
    """One of two processes under ZeRO-3, which goes on with what FSDP2 began."""
    for what in EXACT:
        accelerator = start("zero3", folder)
        if accelerator.is_main_process:
            at_step_2(folder / "fsdp2" / what, folder / "zero3" / what)
        accelerator.wait_for_everyone()
        train(data, folder / "zero3" / what, what, accelerator, resume=True)
    torch.distributed.destroy_process_group()


def what_ran(accelerator: Accelerator, model: MultimodalLM) -> dict[str, Any]:
    """Seen from inside, so that nothing else can pass for it."""
    parameters = list(model.parameters())
    return {
        "said": engines.describe(accelerator),
        "world_size": torch.distributed.get_world_size(),
        "encoder": type(model.vision_encoder).__name__,
        "sharded": all(type(p).__name__ == "DTensor" and p.device_mesh.size() == 2 for p in parameters),
        "share": sum(p.to_local().numel() for p in parameters) / sum(p.numel() for p in parameters),
    }


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`one` for one process, `fsdp2` for two ranks."""
    folder = tmp_path_factory.mktemp("fsdp")
    data = with_text_only(write_llava(folder, 12))
    for what in EXACT:
        train(data, folder / "one" / what, what)
    on_two_ranks(on_rank, data, folder)
    return folder


def test_fsdp2_ran_on_both_ranks_with_half_of_each_weight(runs: Path) -> None:
    for what in WHAT:
        for name in (what, f"{what}-resumed"):
            for rank in (0, 1):
                ran = json.loads((runs / "fsdp2" / name / f"rank-{rank}.json").read_text())
                assert (ran["said"], ran["world_size"], ran["sharded"]) == ("ranks: 2, on cpu, FSDP2", 2, True)
                assert 0.45 < ran["share"] < 0.55
                assert ran["encoder"] == "FSDPVisionEncoder"


@pytest.mark.parametrize("what", EXACT)
def test_two_ranks_leave_the_losses_and_the_stage_of_one_process(runs: Path, what: str) -> None:
    assert_same_run(runs / "one" / what, runs / "fsdp2" / what)


@pytest.mark.parametrize("what", WHAT)
def test_resumed_run_is_the_run_that_was_not_cut_off(runs: Path, what: str) -> None:
    whole, resumed = runs / "fsdp2" / what, runs / "fsdp2" / f"{what}-resumed"
    assert metrics(resumed) == metrics(whole)
    for name, tensor in stage_tensors(whole).items():
        assert torch.equal(stage_tensors(resumed)[name], tensor), name


@pytest.mark.parametrize("what", EXACT)
def test_run_of_one_process_goes_on_under_fsdp2_and_back(runs: Path, what: str, tmp_path: Path) -> None:
    assert_same_run(runs / "one" / what, runs / "fsdp2" / f"{what}-from-one")
    back = at_step_2(runs / "fsdp2" / what, tmp_path / "back")
    train(runs / "data.json", back, what, resume=True)
    assert_same_run(runs / "one" / what, back)


def test_run_goes_from_fsdp2_to_zero3(runs: Path) -> None:
    make_ready("zero3", runs)
    on_two_ranks(zero3_on_rank, runs / "data.json", runs)
    for what in EXACT:
        assert_same_run(runs / "one" / what, runs / "zero3" / what)


def test_frozen_bfloat16_beside_trained_float32_is_that_of_one_process(runs: Path, tmp_path: Path) -> None:
    model = train(runs / "data.json", tmp_path, "bf16")
    assert {p.dtype for p in model.llm.parameters()} == {HALF, torch.float32}
    for ours, theirs in zip(metrics(tmp_path), metrics(runs / "fsdp2" / "bf16"), strict=True):
        assert theirs == pytest.approx(ours, rel=1e-2)
    assert {tensor.dtype for tensor in stage_tensors(runs / "fsdp2" / "bf16").values()} == {torch.float32}


@pytest.mark.parametrize("name", ["accelerate_fsdp2", "accelerate_cpu_fsdp2"])
def test_launcher_config_names_fsdp2(name: str) -> None:
    launcher = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
    assert (launcher["distributed_type"], launcher["fsdp_config"]["fsdp_version"]) == ("FSDP", 2)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """As behind `accelerate launch` with an FSDP config."""
    monkeypatch.setenv(fsdp.TAKEN, "false")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")  # taking over sets it; it shall not stay
    return monkeypatch


def test_one_process_in_the_place_of_fsdp2_is_refused(asked: pytest.MonkeyPatch) -> None:
    asked.setenv("WORLD_SIZE", "2")
    fsdp.take_over()
    with pytest.raises(ValueError, match=r"FSDP2 on 2 processes was asked for, but accelerate runs NO on 1"):
        engines.confirm(Accelerator(cpu=True))


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("FSDP_VERSION", "1", "set fsdp_version: 2"),
        ("FSDP_OFFLOAD_PARAMS", "true", "zero3_offload"),
        ("FSDP_ACTIVATION_CHECKPOINTING", "true", r"set train\.gradient_checkpointing"),
    ],
)
def test_wish_of_the_launcher_that_is_not_fulfilled_is_refused(
    asked: pytest.MonkeyPatch, name: str, value: str, words: str
) -> None:
    asked.setenv(name, value)
    with pytest.raises(ValueError, match=words):
        fsdp.take_over()


def test_muon_a_feature_cache_and_four_bits_are_refused(asked: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fsdp.take_over()
    one = Accelerator(cpu=True)
    for train, quantisation, words in (
        (settings(tmp_path, optimizer="muon"), None, "use adamw"),
        (settings(tmp_path, feature_cache=1.0), None, "leave the cache out"),
        (settings(tmp_path), "nf4", "four bits"),
    ):
        with pytest.raises(ValueError, match=words):
            engines.check(one, train, quantisation)
