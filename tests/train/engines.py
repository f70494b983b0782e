"""What the tests of all engines share: an accelerator of each on forked CPU ranks, as `accelerate launch` and the
recipes make it; data that is text only on some ranks; a run as it stood half-way."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from accelerate import Accelerator

from conftest import forget_accelerate
from mllm.train import engine as engines
from mllm.train.engines.fsdp import TAKEN

CONFIGS = Path(__file__).parents[2] / "deepspeed_configs"


def start(engine: str, folder: Path, precision: str = "no") -> Accelerator:
    """Never another engine in silence. `folder` holds the JSON of a ZeRO engine."""
    forget_accelerate()
    for name in ("ACCELERATE_USE_CPU", "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP", TAKEN):
        os.environ.pop(name, None)
    if engine.startswith("zero"):
        os.environ.update(
            DS_ACCELERATOR="cpu",
            ACCELERATE_USE_DEEPSPEED="true",
            ACCELERATE_DEEPSPEED_CONFIG_FILE=str(folder / f"{engine}.json"),
        )
    elif engine == "fsdp2":
        os.environ.update(ACCELERATE_USE_FSDP="true", FSDP_VERSION="2")
    handlers = engines.process_group()
    accelerator = Accelerator(
        mixed_precision=precision, kwargs_handlers=handlers, cpu=None if engine.startswith("zero") else True
    )
    engines.confirm(accelerator)
    return accelerator


def config_that_shards_all(engine: str) -> str:
    """The repository's own file, but no weight is too small to be sharded."""
    config = json.loads((CONFIGS / f"{engine}.json").read_text())
    if "stage3_param_persistence_threshold" in config["zero_optimization"]:
        config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    return json.dumps(config)


def make_ready(engine: str, folder: Path) -> None:
    """What `start` needs of a ZeRO engine, every weight sharded; skips the test where DeepSpeed is not installed."""
    if engine.startswith("zero"):
        pytest.importorskip("deepspeed", reason="deepspeed is not installed: pip install 'mllm[deepspeed]'")
        (folder / f"{engine}.json").write_text(config_that_shards_all(engine))


def with_text_only(path: Path) -> Path:
    """Take the picture from two records of three: some micro-batches have none on one rank, and one on the other."""
    records = json.loads(path.read_text())
    for record in records:
        if int(record["id"][1:]) % 3:
            del record["image"]
            record["conversations"][0]["value"] = record["conversations"][0]["value"].removeprefix("<image>\n")
    path.write_text(json.dumps(records))
    return path


def at_step_2(source: Path, target: Path) -> Path:
    """A run as it stood after its second step."""
    shutil.copytree(source, target)
    shutil.rmtree(target / "checkpoints" / "step-4")
    return target
