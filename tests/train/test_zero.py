"""DeepSpeed's ZeRO on two CPU processes: the same run as one process, whatever is sharded.

Two ranks are forked for each engine and do all its runs; the tests compare what they left.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from accelerate import Accelerator

from conftest import make_processor
from engines import CONFIGS, at_step_2, config_that_shards_all, start, with_text_only
from mllm.models.multimodal import MultimodalLM
from mllm.train import engine as engines
from mllm.train.engines import zero
from mllm.train.settings import TrainConfig
from mllm.train.stage_folder import save_stage
from mllm.train.trainable import LearningRates
from runs import LORA, assert_same_run, chosen_model, metrics, on_two_ranks, run, settings, stage_tensors, write_llava

pytest.importorskip("deepspeed", reason="deepspeed is not installed: pip install 'mllm[deepspeed]'")
pytestmark = pytest.mark.recipe

WHAT: dict[str, dict[str, Any]] = {
    "align": {},
    "lora": LORA,
    "full": {"learning_rate": LearningRates(connector=1e-2, llm=1e-3, vision_encoder=1e-3)},
    "bf16": {**LORA, "mixed_precision": "bf16"},
}
RUNS: dict[str, list[str]] = {
    "ddp": ["align", "lora", "bf16"],
    "zero1": ["align", "lora"],
    "zero2": ["align", "lora", "full", "bf16"],
    "zero3": ["align", "lora", "full", "bf16"],
    "zero3_offload": ["align", "lora"],
}
EXACT = [(engine, what) for engine, names in RUNS.items() for what in names if what != "bf16"]
"""What is compared to one process in float32."""


def train_config(folder: Path, what: str, **changes: Any) -> TrainConfig:
    """Four steps of two micro-batches on each of two ranks; a norm that clips; checkpoints after each second step."""
    plain = {"rows_per_micro_batch": 1, "max_grad_norm": 0.5, "save_every": 2, "weight_decay": 0.1}
    return settings(folder, **{**plain, **WHAT[what], **changes})


def train(
    data: Path, folder: Path, what: str, accelerator: Accelerator | None = None, resume: bool = False
) -> MultimodalLM:
    """A run and the stage that it leaves."""
    config = train_config(folder, what)
    model = chosen_model(config, tie_word_embeddings=what == "full")
    run(data, config, model, resume, accelerator)
    is_main = accelerator is None or accelerator.is_main_process
    save_stage(folder, model, make_processor(), "model: {}\n", is_main)
    return model


def on_rank(rank: int, engine: str, data: Path, folder: Path) -> None:
    """One of two processes: each run, each run resumed, and what one process began."""
    for what in RUNS[engine]:
        begun = {f"{what}-resumed": folder / engine / what, f"{what}-from-one": folder / "one" / what}
        for name in [what] if what == "bf16" else [what, *begun]:
            accelerator = start(engine, folder, WHAT[what].get("mixed_precision", "no"))
            here = folder / engine / name
            if name in begun and accelerator.is_main_process:
                at_step_2(begun[name], here)
            accelerator.wait_for_everyone()
            model = train(data, here, what, accelerator, resume=name in begun)
            (here / f"rank-{rank}.json").write_text(json.dumps(what_ran(accelerator, model)))
            accelerator.wait_for_everyone()
    torch.distributed.destroy_process_group()


def what_ran(accelerator: Accelerator, model: MultimodalLM) -> dict[str, Any]:
    """Seen from inside, so that nothing else can pass for an engine."""
    engine = getattr(getattr(accelerator, "deepspeed_engine_wrapped", None), "engine", None)
    return {
        "type": accelerator.distributed_type.value,
        "world_size": torch.distributed.get_world_size(),
        "engine": type(engine).__name__,
        "optimizer": type(getattr(engine, "optimizer", None)).__name__,
        "partitioned gradients": engine is not None and engine.zero_optimization_partition_gradients(),
        "sharded weights": sum(p.numel() == 0 for p in model.parameters()) / sum(1 for _ in model.parameters()),
    }


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder an engine, `one` for one process."""
    import deepspeed  # noqa: F401  (here, so that it is imported once)

    folder = tmp_path_factory.mktemp("zero")
    data = with_text_only(write_llava(folder, 12))
    for what in ("align", "lora", "full"):
        train(data, folder / "one" / what, what)
    for engine in RUNS:
        if engine != "ddp":
            (folder / f"{engine}.json").write_text(config_that_shards_all(engine))
        on_two_ranks(on_rank, engine, data, folder)
    return folder


STAGE_3 = {"optimizer": "DeepSpeedZeroOptimizer_Stage3", "partitioned gradients": True, "sharded weights": 1.0}
RAN: dict[str, dict[str, Any]] = {
    "ddp": {"type": "MULTI_CPU", "engine": "NoneType"},
    "zero1": {"optimizer": "DeepSpeedZeroOptimizer", "partitioned gradients": False, "sharded weights": 0.0},
    "zero2": {"optimizer": "DeepSpeedZeroOptimizer", "partitioned gradients": True, "sharded weights": 0.0},
    "zero3": STAGE_3,
    "zero3_offload": STAGE_3,
}


@pytest.mark.parametrize(("engine", "what"), EXACT)
def test_engine_that_was_asked_for_ran_on_both_ranks(runs: Path, engine: str, what: str) -> None:
    expected = {"type": "DEEPSPEED", "world_size": 2, "engine": "DeepSpeedEngine", **RAN[engine]}
    for name in (what, f"{what}-resumed"):
        for rank in (0, 1):
            ran = json.loads((runs / engine / name / f"rank-{rank}.json").read_text())
            assert expected.items() <= ran.items()


@pytest.mark.parametrize(("engine", "what"), EXACT)
def test_two_ranks_leave_the_losses_and_the_stage_of_one_process(runs: Path, engine: str, what: str) -> None:
    assert_same_run(runs / "one" / what, runs / engine / what)


@pytest.mark.parametrize(("engine", "what"), EXACT)
def test_resumed_run_is_the_run_that_was_not_cut_off(runs: Path, engine: str, what: str) -> None:
    whole, resumed = runs / engine / what, runs / engine / f"{what}-resumed"
    assert metrics(resumed) == metrics(whole)
    for name, tensor in stage_tensors(whole).items():
        assert torch.equal(stage_tensors(resumed)[name], tensor), name


@pytest.mark.parametrize(("engine", "what"), EXACT)
def test_run_of_one_process_goes_on_on_two_ranks_and_back(runs: Path, engine: str, what: str, tmp_path: Path) -> None:
    assert_same_run(runs / "one" / what, runs / engine / f"{what}-from-one")
    back = at_step_2(runs / engine / what, tmp_path / "back")
    train(runs / "data.json", back, what, resume=True)
    assert_same_run(runs / "one" / what, back)


@pytest.mark.parametrize("engine", ["zero2", "zero3"])
def test_autocast_is_that_of_ddp_and_what_trains_stays_in_float32(runs: Path, engine: str) -> None:
    ddp, found = stage_tensors(runs / "ddp" / "bf16"), stage_tensors(runs / engine / "bf16")
    assert ddp.keys() == found.keys()
    assert {tensor.dtype for tensor in found.values()} == {torch.float32}
    if engine == "zero2":
        for name, tensor in ddp.items():
            torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-6)
    # stage 3 adds a bias to a product that bfloat16 has rounded, where torch rounds once: as near as bfloat16 is
    for ours, theirs in zip(metrics(runs / "ddp" / "bf16"), metrics(runs / engine / "bf16"), strict=True):
        assert theirs == pytest.approx(ours, rel=1e-2)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("accelerate_*zero*.yaml")), ids=lambda path: path.stem)
def test_launcher_config_names_an_engine_that_is_there_and_no_number_of_a_run(path: Path) -> None:
    launcher = yaml.safe_load(path.read_text())
    assert launcher["distributed_type"] == "DEEPSPEED"
    assert (
        path.stem.removeprefix("accelerate_").removeprefix("cpu_")
        in launcher["deepspeed_config"]["deepspeed_config_file"]
    )
    engine = json.loads((CONFIGS.parent / launcher["deepspeed_config"]["deepspeed_config_file"]).read_text())
    numbers = {"train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"}
    assert {engine[name] for name in numbers} == {"auto"}
    assert not {"optimizer", "scheduler", "bf16", "fp16"} & engine.keys()


def accelerator_of(stage: int) -> Any:
    return SimpleNamespace(state=SimpleNamespace(deepspeed_plugin=SimpleNamespace(zero_stage=stage)))


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_muon_is_refused_where_its_matrices_would_be_cut_up(stage: int, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="use adamw, or launch without DeepSpeed"):
        engines.check(accelerator_of(stage), settings(tmp_path, optimizer="muon"))


def test_feature_cache_is_refused_where_the_encoder_is_sharded_and_only_there(tmp_path: Path) -> None:
    cached = settings(tmp_path, feature_cache=1.0)
    engines.check(accelerator_of(2), cached)
    with pytest.raises(ValueError, match="use ZeRO stage 2, or leave the cache out"):
        engines.check(accelerator_of(3), cached)


def test_ddp_in_the_place_of_deepspeed_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    accelerator = Accelerator(cpu=True)
    zero.confirm(accelerator)
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(ValueError, match=r"DeepSpeed on 1 processes was asked for, but accelerate runs"):
        zero.confirm(accelerator)
