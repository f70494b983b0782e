"""Where each rank keeps a share of the weights only, the LLM is never whole on one; and the run is the same.

Two ranks are forked for each engine; the tests look at what they measured and left.
"""

from __future__ import annotations

import ctypes
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig

from conftest import ENDS, make_llm, make_processor, write_llava
from engines import config_that_shards_all, start
from mllm.models.attention import check_isolation
from mllm.models.build import ModelConfig, build_model
from mllm.models.deferred import materialise
from mllm.models.multimodal import MultimodalLM
from mllm.train import engine as engines
from mllm.train.engines import fsdp, zero
from mllm.train.engines.shards import whole
from mllm.train.losses import NextToken
from mllm.train.settings import TrainConfig
from mllm.train.stage_folder import load_stage, save_stage, without_adapter
from mllm.train.trainable import LearningRates, choose_trainable, parameter_groups
from runs import LORA, assert_same_run, on_two_ranks, run, settings

pytestmark = pytest.mark.recipe
no_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed: pip install 'mllm[deepspeed]'"
)
ENGINES = [pytest.param("zero3", marks=no_deepspeed), "fsdp2"]
ALIGN = {"learning_rate": LearningRates(connector=1e-3)}
ADAPTER = {**LORA, "learning_rate": LearningRates(connector=1e-3, llm=1e-3)}
FULL = {"learning_rate": LearningRates(connector=1e-3, llm=1e-3)}
CHAIN = {"align": ALIGN, "lora": ADAPTER, "lora-again": ADAPTER, "full": FULL, "full-again": FULL}
"""Stages, each starting from the one before: the LLM frozen, an adapter on it, the same one, merged, whole."""
M_MMAP_THRESHOLD = -3
"""Of malloc.h."""
BIG = {"vocab_size": 4096, "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 9}


def config_of(folder: Path, what: str, steps: int) -> TrainConfig:
    plain = {"rows_per_micro_batch": 1, "save_every": 1, "schedule": "constant", "warmup": 0.0}
    return settings(folder, **{**plain, "steps": steps, **CHAIN[what]})


def built(parts: ModelConfig, train: TrainConfig, deferred: bool, init_from: Path | None = None) -> MultimodalLM:
    """As the recipes do it."""
    torch.manual_seed(3)
    model = build_model(parts, make_processor().image_token_id, deferred)
    if init_from:
        load_stage(model, init_from)
    choose_trainable(model, train.learning_rate, train.lora)
    return model


def on_rank(rank: int, engine: str, folder: Path) -> None:
    """One of two processes: the memory of a big build, both ways; then the chain of stages."""
    for deferred in (True, False):
        share = memory_of_build(start(engine, folder), folder, deferred)
        (folder / f"{engine}-{rank}-{deferred}.txt").write_text(str(share))
    chain(folder, folder / engine, lambda: start(engine, folder))
    torch.distributed.destroy_process_group()


def chain(folder: Path, here: Path, accelerator: Callable[[], Accelerator]) -> None:
    """All stages, each behind the one that one process made before it; of the last the first step is taken, and then,
    by `--resume`, the second."""
    before: Path | None = None
    for what in CHAIN:
        for resume in (False, True) if what == "full-again" else (False,):
            now = accelerator()
            train = config_of(here / what, what, steps=2 if resume else 1)
            model = built(parts_of(folder, "llm"), train, engines.shards_weights(now), before)
            assert any(p.is_meta for p in model.parameters()) == engines.shards_weights(now)
            run(folder / "data.json", train, model, resume, now)
            save_stage(here / what, model, make_processor(), "model: {}\n", now.is_main_process)
            now.wait_for_everyone()
        before = folder / "one" / what


def parts_of(folder: Path, llm: str) -> ModelConfig:
    return ModelConfig(str(folder / "encoder"), str(folder / llm))


def memory_of_build(accelerator: Accelerator, folder: Path, deferred: bool) -> float:
    """The process's memory at its highest while a LoRA run is built and sharded, over the bytes of the LLM's files; and
    the LLM must then be what the files hold."""
    build_and_shard(accelerator, folder, "llm", deferred)  # libraries are in memory now
    give_back_at_once()
    Path("/proc/self/clear_refs").write_text("5")  # the highest mark starts anew
    at_start = memory("VmHWM")
    model = build_and_shard(accelerator, folder, "big", deferred)
    peak = memory("VmHWM") - at_start
    file = folder / "big" / "model.safetensors"
    tensors, saved = whole(without_adapter(model.llm), keep=True), load_file(file)
    assert tensors.keys() == saved.keys()
    assert all(torch.equal(tensors[name], tensor) for name, tensor in saved.items())
    return peak / file.stat().st_size


def give_back_at_once() -> None:
    """Memory of a large tensor goes back when it is freed: such a one is mapped for itself; or, where it came to lie in
    a hole that earlier tests left in the heap of this process, with the next weight that is read."""
    libc = ctypes.CDLL(None)
    libc.mallopt(M_MMAP_THRESHOLD, 2**20)
    libc.malloc_trim(0)

    def next_weight(*arguments: Any, **named: Any) -> None:
        libc.malloc_trim(0)
        materialise(*arguments, **named)

    for module in (zero, fsdp):
        module.materialise = next_weight  # type: ignore[attr-defined]


def build_and_shard(accelerator: Accelerator, folder: Path, llm: str, deferred: bool) -> MultimodalLM:
    train = settings(folder, **LORA)
    model = built(parts_of(folder, llm), train, deferred)
    check_isolation(model.llm)
    zero.settle(accelerator, train, accumulation=1)
    engines.shard(accelerator, NextToken(model), parameter_groups(model, train.learning_rate, 0.0))
    return model


def memory(field: str) -> int:
    """A line of /proc/self/status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(field)).split()[1])


@pytest.fixture(scope="module")
def folder(hub: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Parts on disk, and what both engines made of them."""
    folder = tmp_path_factory.mktemp("sharded")
    (folder / "encoder").symlink_to(hub / "encoder")
    make_llm(num_hidden_layers=2, tie_word_embeddings=True).save_pretrained(folder / "llm", max_shard_size="20KB")
    write_llava(folder, 12)
    torch.manual_seed(0)
    config = LlamaConfig(**BIG, num_attention_heads=8, max_position_embeddings=512, **ENDS)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "big")
    (folder / "zero3.json").write_text(config_that_shards_all("zero3"))
    return folder


@pytest.fixture(scope="module")
def ran(folder: Path) -> set[str]:
    """Engines that are through; one process is."""
    chain(folder, folder / "one", one_process)
    return set()


def one_process() -> Accelerator:
    AcceleratorState._reset_state(reset_partial_state=True)
    return Accelerator(cpu=True)


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest, folder: Path, ran: set[str]) -> str:
    """Its name, once it ran."""
    if request.param not in ran:
        if request.param == "zero3":
            import deepspeed  # noqa: F401  (here, so that it is imported once)
        on_two_ranks(on_rank, request.param, folder)
        ran.add(request.param)
    return request.param


def test_no_rank_ever_holds_the_whole_llm(folder: Path, engine: str) -> None:
    for rank in (0, 1):
        deferred, whole = (float((folder / f"{engine}-{rank}-{way}.txt").read_text()) for way in (True, False))
        print(f"{engine}, rank {rank}: {deferred:.2f} of the LLM at most, {whole:.2f} where it is built whole")
        assert deferred < 0.72  # its half, a tenth for one layer, and what is not given back at once
        assert whole > 1.0


@pytest.mark.parametrize("what", CHAIN)
def test_stages_built_from_shards_are_those_of_one_process(folder: Path, engine: str, what: str) -> None:
    assert_same_run(folder / "one" / what, folder / engine / what)
