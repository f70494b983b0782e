"""DeepSpeed's ZeRO on two CPU processes: the same run as one process, whatever is sharded.

Two ranks are forked for each engine and do all its runs; the tests compare what they left.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from safetensors.torch import load_file

from conftest import make_processor
from mllm.models.multimodal import MultimodalLM
from mllm.train import zero
from mllm.train.checkpoint import save_stage
from mllm.train.loop import TrainConfig
from mllm.train.trainable import LearningRates
from runs import LORA, metrics, on_two_ranks, run, settings, write_llava

pytest.importorskip("deepspeed", reason="deepspeed is not installed: pip install 'mllm[deepspeed]'")
pytestmark = pytest.mark.recipe

CONFIGS = Path(__file__).parents[2] / "deepspeed_configs"
ENGINES = ["ddp", "zero1", "zero2", "zero3", "zero3_offload"]
WHAT: dict[str, dict[str, Any]] = {
    "align": {},
    "lora": LORA,
    "full": {"learning_rate": LearningRates(connector=1e-2, llm=1e-3)},
}


def train_config(folder: Path, what: str, **changes: Any) -> TrainConfig:
    """Four steps of two micro-batches on each of two ranks; a norm that clips; checkpoints after each second step."""
    plain = {"rows_per_micro_batch": 1, "max_grad_norm": 0.5, "save_every": 2, "weight_decay": 0.1}
    return settings(folder, **{**plain, **WHAT[what], **changes})


def train(
    data: Path, folder: Path, what: str, accelerator: Accelerator | None = None, resume: bool = False
) -> MultimodalLM:
    """A run and the stage that it leaves."""
    config = train_config(folder, what)
    model = run(data, config, resume=resume, accelerator=accelerator)
    is_main = accelerator is None or accelerator.is_main_process
    save_stage(folder, model, make_processor(), "model: {}\n", is_main)
    return model


def at_step_2(source: Path, target: Path) -> Path:
    """A run as it stood after its second step."""
    shutil.copytree(source, target)
    shutil.rmtree(target / "checkpoints" / "step-4")
    return target


def on_rank(rank: int, engine: str, data: Path, folder: Path) -> None:
    """One of two processes: each run, each run resumed, and what one process began."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    for what in WHAT:
        for name in (what, f"{what}-resumed", f"{what}-from-one"):
            accelerator = start(engine, folder)
            here = folder / engine / name
            begun = {f"{what}-resumed": folder / engine / what, f"{what}-from-one": folder / "one" / what}.get(name)
            if begun and accelerator.is_main_process:
                at_step_2(begun, here)
            accelerator.wait_for_everyone()
            model = train(data, here, what, accelerator, resume=begun is not None)
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


def start(engine: str, folder: Path) -> Accelerator:
    """An accelerator as `accelerate launch` and the recipes make it; never another engine in silence."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    if engine == "ddp":
        return Accelerator(cpu=True)
    os.environ.update(ACCELERATE_USE_DEEPSPEED="true", ACCELERATE_DEEPSPEED_CONFIG_FILE=str(folder / f"{engine}.json"))
    accelerator = Accelerator(kwargs_handlers=zero.process_group())
    zero.confirm(accelerator)
    zero.build_whole()
    return accelerator


def config_that_shards_all(engine: str) -> str:
    """The repository's own file, but no weight is too small to be sharded."""
    config = json.loads((CONFIGS / f"{engine}.json").read_text())
    if "stage3_param_persistence_threshold" in config["zero_optimization"]:
        config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    return json.dumps(config)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder an engine, `one` for one process."""
    import deepspeed  # noqa: F401  (here, so that it is imported once)

    folder = tmp_path_factory.mktemp("zero")
    data = write_llava(folder, 12)
    for what in WHAT:
        train(data, folder / "one" / what, what)
    for engine in ENGINES:
        if engine != "ddp":
            (folder / f"{engine}.json").write_text(config_that_shards_all(engine))
        on_two_ranks(on_rank, engine, data, folder)
    return folder


def stage_tensors(folder: Path) -> dict[str, torch.Tensor]:
    files = sorted(path for path in folder.rglob("*.safetensors") if "checkpoints" not in path.parts)
    return {f"{path.name}:{name}": tensor for path in files for name, tensor in load_file(path).items()}


def assert_same_run(one: Path, other: Path) -> None:
    for ours, theirs in zip(metrics(one), metrics(other), strict=True):
        assert theirs == pytest.approx(ours, rel=1e-5)
    expected, found = stage_tensors(one), stage_tensors(other)
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")


STAGE_3 = {"optimizer": "DeepSpeedZeroOptimizer_Stage3", "partitioned gradients": True, "sharded weights": 1.0}
RAN: dict[str, dict[str, Any]] = {
    "ddp": {"type": "MULTI_CPU", "engine": "NoneType"},
    "zero1": {"optimizer": "DeepSpeedZeroOptimizer", "partitioned gradients": False, "sharded weights": 0.0},
    "zero2": {"optimizer": "DeepSpeedZeroOptimizer", "partitioned gradients": True, "sharded weights": 0.0},
    "zero3": STAGE_3,
    "zero3_offload": STAGE_3,
}


@pytest.mark.parametrize("what", WHAT)
@pytest.mark.parametrize("engine", ENGINES)
def test_engine_that_was_asked_for_ran_on_both_ranks(runs: Path, engine: str, what: str) -> None:
    expected = {"type": "DEEPSPEED", "world_size": 2, "engine": "DeepSpeedEngine", **RAN[engine]}
    for name in (what, f"{what}-resumed"):
        for rank in (0, 1):
            ran = json.loads((runs / engine / name / f"rank-{rank}.json").read_text())
            assert expected.items() <= ran.items()


@pytest.mark.parametrize("what", WHAT)
@pytest.mark.parametrize("engine", ENGINES)
def test_two_ranks_leave_the_losses_and_the_stage_of_one_process(runs: Path, engine: str, what: str) -> None:
    assert_same_run(runs / "one" / what, runs / engine / what)


@pytest.mark.parametrize("what", WHAT)
@pytest.mark.parametrize("engine", ENGINES)
def test_resumed_run_is_the_run_that_was_not_cut_off(runs: Path, engine: str, what: str) -> None:
    whole, resumed = runs / engine / what, runs / engine / f"{what}-resumed"
    assert metrics(resumed) == metrics(whole)
    for name, tensor in stage_tensors(whole).items():
        assert torch.equal(stage_tensors(resumed)[name], tensor), name


@pytest.mark.parametrize("what", WHAT)
@pytest.mark.parametrize("engine", ENGINES)
def test_run_of_one_process_goes_on_on_two_ranks_and_back(runs: Path, engine: str, what: str, tmp_path: Path) -> None:
    assert_same_run(runs / "one" / what, runs / engine / f"{what}-from-one")
    back = at_step_2(runs / engine / what, tmp_path / "back")
    train(runs / "data.json", back, what, resume=True)
    assert_same_run(runs / "one" / what, back)
