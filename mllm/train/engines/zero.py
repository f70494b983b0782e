"""DeepSpeed's ZeRO under the same loop: what `accelerate launch` chose, fitted to this run.

Enters: the environment of the launcher, the settings of the run. Leaves: an accelerator that really runs DeepSpeed,
and its configuration filled in. Numbers of the run (batch, accumulation, clipping, precision) stand in the run's YAML
alone; the JSON files in `deepspeed_configs/` hold the stage and the sizes of its buckets.

Stage 1 shards the optimiser's moments over the ranks, stage 2 the gradients too, stage 3 the weights as well, frozen
ones among them; in stages 1 and 2 each rank holds all weights.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from mllm.models.deferred import materialise

if TYPE_CHECKING:
    from accelerate import Accelerator

    from mllm.train.settings import TrainConfig


def requested() -> bool:
    """Did the launcher ask for DeepSpeed?"""
    return os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true"


def process_group() -> list[Any]:
    """What `Accelerator` must be told to run DeepSpeed where there is no GPU: gloo, and no compiler.

    Without a backend accelerate would take each process for the only one. DeepSpeed would compile an operation for
    shared memory at its start, for many minutes, and calls compilers to learn whether it can; both end at this table
    of what can be compiled.
    """
    if not requested() or torch.cuda.is_available():
        return []
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed.ops
    from accelerate.utils import InitProcessGroupKwargs

    deepspeed.ops.__compatible_ops__ = {}
    return [InitProcessGroupKwargs(backend="gloo")]


def confirm(accelerator: Accelerator) -> None:
    """Stop where DeepSpeed was asked for and something else would run in its place, and pass for it.

    Raises:
        ValueError: the accelerator runs plain DDP, or each process on its own.
    """
    from accelerate import DistributedType

    if not requested():
        return
    world_size, found = int(os.environ.get("WORLD_SIZE", "1")), accelerator.distributed_type
    if found != DistributedType.DEEPSPEED or accelerator.num_processes != world_size:
        raise ValueError(
            f"DeepSpeed on {world_size} processes was asked for, but accelerate runs {found.value} on "
            f"{accelerator.num_processes}: unset ACCELERATE_USE_CPU, and start with accelerate launch --config_file "
            f"deepspeed_configs/accelerate_cpu_zero2.yaml (CPU) or accelerate_zero2.yaml (GPU)"
        )


def build_whole() -> None:
    """Keep transformers from building models in shards for stage 3: `shard` cuts them, when LoRA, the weights of an
    earlier stage and what trains are settled. Until then an LLM is whole, or deferred (`models/deferred.py`)."""
    if not requested():
        return
    from transformers.integrations import unset_hf_deepspeed_config

    unset_hf_deepspeed_config()


def stage(accelerator: Accelerator) -> int:
    """1, 2 or 3; 0 where DeepSpeed does not run."""
    plugin = accelerator.state.deepspeed_plugin
    return int(plugin.zero_stage) if plugin else 0


def settle(accelerator: Accelerator, train: TrainConfig, accumulation: int) -> None:
    """Fill in what the JSON leaves open, before the engine is made."""
    if not stage(accelerator):
        return
    config = accelerator.state.deepspeed_plugin.deepspeed_config
    accelerator.gradient_accumulation_steps = accumulation
    config["gradient_accumulation_steps"] = accumulation
    config["train_micro_batch_size_per_gpu"] = train.rows_per_micro_batch
    config["train_batch_size"] = train.rows_per_step
    config["gradient_clipping"] = train.max_grad_norm
    if accelerator.device.type == "cpu":
        config["zero_optimization"]["overlap_comm"] = False  # there are no streams that could overlap
    # what trains stays in float32 and travels so, as without DeepSpeed; its own `bf16` would keep it in bfloat16
    config["bf16"] = {"enabled": False}
    config["torch_autocast"] = {
        "enabled": train.mixed_precision == "bf16",
        "dtype": "bfloat16",
        "lower_precision_safe_modules": [],
    }


def autocast(accelerator: Accelerator) -> torch.autocast:
    """What `settle` has told DeepSpeed."""
    asked = accelerator.state.deepspeed_plugin.deepspeed_config.get("torch_autocast", {})
    return torch.autocast(accelerator.device.type, torch.bfloat16, enabled=asked.get("enabled", False))


def shard(accelerator: Accelerator, module: nn.Module) -> None:
    """For stage 3, leave on this rank's device its share of each weight, one weight at a time. The engine would first
    put the whole model on every device. A deferred weight is read when its turn comes, by the first rank: DeepSpeed
    sends the others what that one has."""
    import deepspeed

    weights = list(module.parameters())

    def one_at_a_time(recurse: bool = True) -> Iterator[nn.Parameter]:
        for weight in weights:
            materialise(weight, values=accelerator.is_main_process)
            yield weight

    module.parameters = one_at_a_time  # type: ignore[method-assign]  # what DeepSpeed goes through
    deepspeed.zero.Init(module=module, config_dict_or_path=accelerator.state.deepspeed_plugin.deepspeed_config)
    del module.parameters
    for buffer in module.buffers():
        buffer.data = buffer.data.to(accelerator.device)


def backward(accelerator: Accelerator, loss: torch.Tensor, is_last: bool) -> None:
    """The backward pass of a micro-batch. Under DeepSpeed that of the last one clips and steps as well."""
    if not stage(accelerator):
        return accelerator.backward(loss)
    accelerator.sync_gradients = is_last
    accelerator.backward(loss, scale_wrt_gas=False)  # the step's own scale has the accumulation in it
