"""Small real runs for the tests of this folder: a LLaVA file, an index, `fit` on the CPU."""

from __future__ import annotations

import gc
import json
import os
import socket
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from torch.multiprocessing import start_processes

from conftest import forget_accelerate, make_model, make_processor, write_llava
from mllm.data.formats.llava import LlavaSource
from mllm.data.held_out import index_held_out
from mllm.data.index import build_index
from mllm.data.loader import DataConfig
from mllm.data.processor import Processor
from mllm.models.multimodal import MultimodalLM
from mllm.train.engines import zero
from mllm.train.loop import fit
from mllm.train.route import make_plan
from mllm.train.settings import TrainConfig
from mllm.train.trainable import LearningRates, Lora, choose_trainable

SEQ_LENGTH = 96
DEEPSPEED = Path(__file__).parents[2] / "deepspeed_configs"


def settings(folder: Path, **changes: Any) -> TrainConfig:
    """A run of a few steps at rates that move every weight."""
    plain = {"learning_rate": LearningRates(connector=1e-2), "steps": 4, "rows_per_step": 4, "rows_per_micro_batch": 2}
    return TrainConfig(output_dir=folder, **{**plain, **changes})


def chosen_model(train: TrainConfig, seed: int = 0, **llm: Any) -> MultimodalLM:
    """A tiny model in which what the settings name is switched on."""
    model = make_model(seed=seed, **llm)
    torch.manual_seed(5)
    choose_trainable(model, train.learning_rate, train.lora)
    return model


def run(
    data: Path,
    train: TrainConfig,
    model: MultimodalLM | None = None,
    resume: bool = False,
    accelerator: Accelerator | None = None,
    processor: Processor | None = None,
    **changes: Any,
) -> MultimodalLM:
    """Index, fit, return the trained model; `data` is a LLaVA file."""
    processor = processor or make_processor()
    model = model or chosen_model(train)
    config = DataConfig([LlavaSource(path=data)], seq_length=SEQ_LENGTH, **{"num_workers": 0, **changes})
    taken_out = config.held_out if isinstance(config.held_out, int) else 0
    index = build_index(config.sources, processor, SEQ_LENGTH, progress=False, held_out=taken_out)
    index_held_out(index, config, processor)
    train.output_dir.mkdir(parents=True, exist_ok=True)
    plan = make_plan(index, config, train, resume)
    fit(accelerator or Accelerator(cpu=True), model, processor, index, plan, config, train, resume)
    return model


def metrics(folder: Path, *names: str) -> list[tuple[Any, ...]]:
    """Per step the named numbers; step, loss and gradient norm where none are named."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [tuple(line[name] for name in names or ("step", "loss", "grad_norm")) for line in lines]


def weights(model: MultimodalLM) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def stage_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All that a stage folder holds, by file and name."""
    files = sorted(path for path in folder.rglob("*.safetensors") if "checkpoints" not in path.parts)
    return {f"{path.name}:{name}": tensor for path in files for name, tensor in load_file(path).items()}


def assert_same_run(one: Path, other: Path) -> None:
    """The same losses and the same stage, but for the order in which ranks add."""
    for ours, theirs in zip(metrics(one), metrics(other), strict=True):
        assert theirs == pytest.approx(ours, rel=1e-5)
    expected, found = stage_tensors(one), stage_tensors(other)
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")


def on_two_ranks(function: Callable[..., None], *arguments: object) -> None:
    """`function(rank, *arguments)` in two processes that know of each other; forked, so that nothing is imported
    twice."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    start_processes(as_rank, args=(port, function, *arguments), nprocs=2, start_method="fork")


def as_rank(rank: int, port: int, function: Callable[..., None], *arguments: object) -> None:
    """What a launcher sets, and no memory of the parent, which is one process."""
    gc.freeze()  # nor does the parent's garbage concern this one: ZeRO-3 collects at each start
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    forget_accelerate()
    function(rank, *arguments)


def start_engine(engine: str, threshold: int = 0) -> Accelerator:
    """An accelerator as `accelerate launch` and the recipes make it: `ddp`, or a DeepSpeed file of the repository, by
    its name. Under stage 3 no weight is too small to be sharded."""
    forget_accelerate()
    if engine == "ddp":
        return Accelerator(cpu=True)
    config = json.loads((DEEPSPEED / f"{engine}.json").read_text())
    if "stage3_param_persistence_threshold" in config["zero_optimization"]:
        config["zero_optimization"]["stage3_param_persistence_threshold"] = threshold
    with tempfile.NamedTemporaryFile("w", suffix=".json", delete=False) as file:
        json.dump(config, file)
    os.environ.update(DS_ACCELERATOR="cpu", ACCELERATE_USE_DEEPSPEED="true")
    os.environ["ACCELERATE_DEEPSPEED_CONFIG_FILE"] = file.name
    accelerator = Accelerator(kwargs_handlers=zero.process_group())
    zero.confirm(accelerator)
    zero.build_whole()
    return accelerator


LORA = {"lora": Lora(rank=4, alpha=8), "learning_rate": LearningRates(connector=1e-2, llm=1e-2)}
FULL = {"learning_rate": LearningRates(connector=1e-2, llm=1e-3, vision_encoder=1e-3)}

__all__ = [
    "FULL",
    "LORA",
    "assert_same_run",
    "chosen_model",
    "metrics",
    "on_two_ranks",
    "run",
    "settings",
    "stage_tensors",
    "start_engine",
    "weights",
    "write_llava",
]
