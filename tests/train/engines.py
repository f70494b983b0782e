"""An accelerator of each engine on forked CPU ranks, as `accelerate launch` and the recipes make it."""

from __future__ import annotations

import json
import os
from pathlib import Path

from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState

from mllm.train import engine as engines
from mllm.train.engines.fsdp import TAKEN

CONFIGS = Path(__file__).parents[2] / "deepspeed_configs"


def start(engine: str, folder: Path, precision: str = "no") -> Accelerator:
    """Never another engine in silence. `folder` holds the JSON of a ZeRO engine."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
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
