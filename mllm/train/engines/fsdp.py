"""torch's FSDP2 (`fully_shard`) under the same loop: each rank keeps its share of weights, gradients and moments.

Enters: the environment of `accelerate launch` with an FSDP config. Leaves: the objective cut into shards, layer by
layer, and an optimiser over them. accelerate's own FSDP2 runs on accelerators only, and on a CPU plain DDP in its
place, without a word; it also wants the model whole. So the launcher is accelerate's, and `fully_shard` is called
here: the same code on CPU ranks, where it is tested, and on GPUs.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from mllm.models.deferred import materialise

if TYPE_CHECKING:
    from accelerate import Accelerator

TAKEN = "MLLM_FSDP2"
"""Set in the environment from the moment at which the launcher's wish is ours to fulfil."""


def requested() -> bool:
    """Did the launcher ask for FSDP?"""
    return any(os.environ.get(name, "false").lower() == "true" for name in ("ACCELERATE_USE_FSDP", TAKEN))


def take_over() -> None:
    """Before an accelerator exists: hide the wish from accelerate, which would wrap the model itself, and from
    transformers, which would read weights on the first rank only.

    Raises:
        ValueError: the launcher's config asks for what is not done here.
    """
    if not requested():
        return
    refused = {
        "FSDP_OFFLOAD_PARAMS": "fsdp_offload_params: use deepspeed_configs/accelerate_zero3_offload.yaml",
        "FSDP_ACTIVATION_CHECKPOINTING": "fsdp_activation_checkpointing: set train.gradient_checkpointing",
    }
    if os.environ.get("FSDP_VERSION", "1") != "2":
        raise ValueError(
            "FSDP version 1 was asked for: set fsdp_version: 2, as deepspeed_configs/accelerate_fsdp2.yaml does"
        )
    for name, instead in refused.items():
        if os.environ.get(name, "false").lower() == "true":
            raise ValueError(f"the launcher's config sets {instead}")
    os.environ.update({"ACCELERATE_USE_FSDP": "false", TAKEN: "true"})
    if not torch.cuda.is_available():
        os.environ["ACCELERATE_USE_CPU"] = "true"  # else accelerate would take each process for the only one


def confirm(accelerator: Accelerator) -> None:
    """Stop where the processes that were started do not know of each other.

    Raises:
        ValueError: says how many were started and how many accelerate sees.
    """
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if requested() and (accelerator.num_processes != started or not is_joined()):
        raise ValueError(
            f"FSDP2 on {started} processes was asked for, but accelerate runs {accelerator.distributed_type.value} on "
            f"{accelerator.num_processes}: start with accelerate launch --config_file "
            f"deepspeed_configs/accelerate_cpu_fsdp2.yaml (CPU) or accelerate_fsdp2.yaml (GPU)"
        )


def is_joined() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def shard(accelerator: Accelerator, objective: nn.Module, groups: list[dict[str, Any]]) -> None:
    """Cut up every weight, one unit at a time, in place. A weight becomes another object: `groups` are given the new
    ones, and hold none of the old while the model is cut, which would keep it whole."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    names = {id(parameter): name for name, parameter in objective.named_parameters()}
    for group in groups:
        group["params"] = [names[id(parameter)] for parameter in group["params"]]
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    again = os.environ.get("FSDP_RESHARD_AFTER_FORWARD", "true") == "true"
    for unit in [*units(objective), objective]:
        for parameter in unit.parameters():
            materialise(parameter, accelerator.device)
        fully_shard(unit, mesh=mesh, reshard_after_forward=again and unit is not objective)
    for buffer in objective.buffers():
        buffer.data = buffer.data.to(accelerator.device)
    sharded = dict(objective.named_parameters())
    assert all(hasattr(parameter, "full_tensor") for parameter in sharded.values()), "fully_shard left weights whole"
    for group in groups:
        group["params"] = [sharded[name] for name in group["params"]]


def units(objective: Any) -> list[nn.Module]:
    """What is put together at a time, inner ones first: encoder, connector, each layer of the LLM, and its embeddings
    and head, unless they are one weight."""
    model = objective.model
    llm = model.llm
    layers = [module for module in llm.modules() if type(module).__name__ in (llm._no_split_modules or ())]
    ends = [llm.get_input_embeddings(), llm.get_output_embeddings()]
    is_tied = ends[0].weight is ends[1].weight
    return [model.vision_encoder, model.connector, *layers, *([] if is_tied else ends)]


def wrap(accelerator: Accelerator, objective: nn.Module) -> nn.Module:
    """Mixed precision as without shards: autocast around the forward pass, what trains in float32."""
    return accelerator.prepare_model(objective, device_placement=False, evaluation_mode=True)
