"""Who carries the run: one process, plain DDP, DeepSpeed's ZeRO (`zero`) or torch's FSDP2 (`fsdp`).

The launcher chose; here is one face for all of them, so that the loop and the step need not know which. None passes for
another: what was asked for runs, or the run stops.
"""

from __future__ import annotations

import os
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from mllm.train.engines import fsdp, zero

if TYPE_CHECKING:
    from accelerate import Accelerator

    from mllm.train.settings import TrainConfig


def process_group() -> list[Any]:
    """What `Accelerator` must be told before it exists.

    Raises:
        ValueError: fewer processes were started than asked for, or FSDP was asked for something that is not done.
    """
    check_launcher()
    fsdp.take_over()
    return zero.process_group()


def check_launcher() -> None:
    """`accelerate launch --cpu --num_processes 2` starts one process, and tells nobody but that process, by an address
    at which the others would be met.

    Raises:
        ValueError: says how to start more than one.
    """
    is_alone = "ACCELERATE_MIXED_PRECISION" in os.environ and "RANK" not in os.environ
    if is_alone and "MASTER_PORT" in os.environ:
        raise ValueError(
            "accelerate launch was asked for several processes and started one, as it does with --cpu: start them with "
            "--config_file deepspeed_configs/accelerate_cpu_zero2.yaml (or accelerate_cpu_fsdp2.yaml), or with "
            "torchrun --nproc_per_node 2; for one process leave out --num_processes, and unset MASTER_PORT"
        )


def confirm(accelerator: Accelerator) -> None:
    """Stop where something else runs than the launcher was asked for.

    Raises:
        ValueError: says what runs, and how to start what was meant.
    """
    zero.confirm(accelerator)
    fsdp.confirm(accelerator)
    zero.build_whole()


def shards_weights(accelerator: Accelerator) -> bool:
    """Does each rank keep its share of the weights only?"""
    return zero.stage(accelerator) == 3 or fsdp.requested()


def halves(accelerator: Accelerator) -> bool:
    """Is a micro-batch that does not fit in memory computed in halves? Not where ranks exchange weights or gradients
    inside of the passes: none can step back from one."""
    return not (zero.stage(accelerator) or fsdp.requested())


def autocast(accelerator: Accelerator) -> AbstractContextManager[None]:
    """That of the forward pass, for what is computed outside of it. accelerate's own does nothing under DeepSpeed,
    which has another one inside of its forward pass."""
    return zero.autocast(accelerator) if zero.stage(accelerator) else accelerator.autocast()


def describe(accelerator: Accelerator) -> str:
    """What runs, in words."""
    ranks = f"ranks: {accelerator.num_processes}, on {accelerator.device.type}"
    if fsdp.requested():
        return f"{ranks}, FSDP2"
    return f"{ranks}, DeepSpeed ZeRO stage {zero.stage(accelerator)}" if zero.stage(accelerator) else ranks


def check(accelerator: Accelerator, train: TrainConfig, quantisation: str | None = None) -> None:
    """Stop where the engine would change what a setting means, or cannot do it.

    Raises:
        ValueError: names the setting and what to do.
    """
    cuts_up = zero.stage(accelerator) or fsdp.requested()
    if cuts_up and train.optimizer == "muon":
        raise ValueError(
            "train.optimizer muon steps whole matrices, and this engine cuts them into shards: "
            "use adamw, or launch without DeepSpeed and FSDP2"
        )
    if fsdp.requested() and quantisation:
        raise ValueError(
            f"model.quantisation {quantisation} under FSDP2, which cuts weights into rows, and four bits are packed "
            f"without rows: use DeepSpeed ZeRO stage 2 or plain DDP, or leave the quantisation out"
        )
    if shards_weights(accelerator) and train.keeps_features:
        raise ValueError(
            "train.feature_cache or train.feature_cache_dir where the encoder is sharded (ZeRO stage 3, FSDP2): "
            "a rank that has all its images in "
            "the cache would not take part when the others put it together: use ZeRO stage 2, or leave the cache out"
        )


def prepare(
    accelerator: Accelerator, objective: nn.Module, groups: list[dict[str, Any]], make: Any
) -> tuple[nn.Module, torch.optim.Optimizer, list[nn.Parameter]]:
    """Hand model and optimiser to the engine.

    The weights of `groups` are those that the engine holds from here on; `make` makes the optimiser of them.

    Returns:
        the objective to call, the optimiser to step, and what trains, in the order of the groups.
    """
    shard(accelerator, objective, groups)
    members = [parameter for group in groups for parameter in group["params"]]
    optimizer = make(groups)
    if fsdp.requested():
        return fsdp.wrap(accelerator, objective), accelerator.prepare_optimizer(optimizer), members
    return (*accelerator.prepare(objective, optimizer), members)


def shard(accelerator: Accelerator, objective: nn.Module, groups: list[dict[str, Any]]) -> None:
    """Leave on this rank its share of each weight, where the engine wants that."""
    if fsdp.requested():
        fsdp.shard(accelerator, objective, groups)
    elif zero.stage(accelerator) == 3:
        zero.shard(accelerator, objective)


def clip(accelerator: Accelerator, objective: nn.Module, max_norm: float) -> float:
    """Scale the gradient down to `max_norm`; its norm before. DeepSpeed has clipped by now, and tells the norm."""
    norm = accelerator.clip_grad_norm_(objective.parameters(), max_norm)
    return float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
