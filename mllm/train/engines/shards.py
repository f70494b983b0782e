"""Whole tensors of a model and an optimiser that DeepSpeed or FSDP2 has cut into shards, and back.

Enters: parameters, an optimiser. Leaves: tensors as one process would hold them, so that what is saved does not
depend on how many ranks there were. Every rank must call each of these: the shards come from all of them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

KEYS = ("exp_avg", "exp_avg_sq")
"""AdamW's moments, by torch's names."""


def whole(tensors: dict[str, Tensor], keep: bool) -> dict[str, Tensor]:
    """The same names with whole tensors in the computer's memory, put together one at a time; none where `keep` is
    False."""
    return {name: found for name, tensor in tensors.items() if (found := put_together(tensor, keep)) is not None}


def put_together(tensor: Tensor, keep: bool) -> Tensor | None:
    if hasattr(tensor, "full_tensor"):  # FSDP2's
        found = tensor.detach().full_tensor()  # type: ignore[attr-defined]
        return found.cpu() if keep else None
    if not hasattr(tensor, "ds_id"):  # DeepSpeed's mark on what stage 3 has cut up
        return tensor.detach().cpu() if keep else None
    import deepspeed

    with deepspeed.zero.GatheredParameters([tensor]):
        return tensor.detach().cpu().clone() if keep else None


def put_all_together(state: Any, keep: bool) -> Any:
    """The same state with whole tensors; an empty one where `keep` is False."""
    if isinstance(state, dict):
        return {key: put_all_together(value, keep) for key, value in state.items()}
    return put_together(state, keep) if isinstance(state, Tensor) and hasattr(state, "full_tensor") else state


def cut_up(state: Any, parameter: nn.Parameter) -> Any:
    """The state of one parameter, its tensors in shards where the parameter is (FSDP2)."""
    if not hasattr(parameter, "full_tensor"):
        return state
    from torch.distributed.tensor import distribute_tensor

    mesh, placements = parameter.device_mesh, parameter.placements  # type: ignore[attr-defined]
    return {
        key: distribute_tensor(value.to(mesh.device_type), mesh, placements)
        if value.shape == parameter.shape
        else value
        for key, value in state.items()
    }


def is_sharded(optimizer: torch.optim.Optimizer) -> bool:
    """Does DeepSpeed hold the moments, each rank its share?"""
    from accelerate.utils import DeepSpeedOptimizerWrapper

    return isinstance(optimizer, DeepSpeedOptimizerWrapper)


def moments(optimizer: torch.optim.Optimizer, trained: list[nn.Parameter], step: int, keep: bool) -> dict[str, Any]:
    """The state of the optimiser in torch's layout, parameters numbered in the order of its groups."""
    if not is_sharded(optimizer):
        return put_all_together(optimizer.state_dict(), keep)
    from deepspeed.utils import safe_get_full_optimizer_state

    link(optimizer.optimizer)  # type: ignore[attr-defined]
    taken = steps_taken(optimizer.optimizer, step)  # type: ignore[attr-defined]
    state = {}
    for number, parameter in enumerate(trained):
        full = {key: safe_get_full_optimizer_state(parameter, key) for key in KEYS}
        if keep:
            state[number] = {"step": torch.tensor(taken), **{key: full[key].cpu() for key in KEYS}}
    return {"state": state}


def steps_taken(zero: Any, step: int) -> float:
    """As the optimiser counts them, without those that the guard left out."""
    counted = (state["step"] for state in zero.optimizer.state.values() if "step" in state)
    return float(next(counted, step))


def load_moments(optimizer: torch.optim.Optimizer, trained: list[nn.Parameter], state: dict[int, Any]) -> None:
    """Give the optimiser what `moments` read, by whichever number of ranks it was written."""
    if not is_sharded(optimizer):
        groups = optimizer.state_dict()["param_groups"]  # rates and decay are the config's, not the checkpoint's
        state = {number: cut_up(own, trained[number]) for number, own in state.items()}
        return optimizer.load_state_dict({"state": state, "param_groups": groups})
    zero = optimizer.optimizer  # type: ignore[attr-defined]
    make_room(zero, step=float(state[0]["step"]))
    for number, parameter in enumerate(trained):
        for key in KEYS:
            set_moment(parameter, state[number][key], key)


def make_room(zero: Any, step: float) -> None:
    """Moments of zero: DeepSpeed makes them in its first step only, and has no public way to make them sooner."""
    flat_shards = getattr(zero, "fp32_partitioned_groups_flat", None)  # stage 3
    for flat in zero.single_partition_of_fp32_groups if flat_shards is None else flat_shards:
        zero.optimizer.state[flat] = {"step": torch.tensor(step), **{key: torch.zeros_like(flat) for key in KEYS}}
    link(zero)


def link(zero: Any) -> None:
    """Let every parameter find its moments. Stages 1 and 2 link them behind the step of the first group, when those
    of the other groups do not exist yet (DeepSpeed 0.19)."""
    if hasattr(zero, "_lazy_init_hp_params_optimizer_state"):
        zero._hp_optimizer_states_linked = False
        zero._lazy_init_hp_params_optimizer_state()


def set_moment(parameter: nn.Parameter, value: Tensor, key: str) -> None:
    """This rank's share of one moment of one parameter."""
    from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

    value = value.to(parameter.device)
    if not hasattr(parameter, "ds_id"):
        return safe_set_full_optimizer_state(parameter, value, key)
    size = parameter.ds_tensor.numel()  # type: ignore[attr-defined]  # equal on all ranks: the last one's is padded
    shards = torch.nn.functional.pad(value.flatten(), (0, -value.numel() % size)).split(size)
    rank = torch.distributed.get_rank()
    mine = shards[rank] if rank < len(shards) else torch.zeros_like(shards[0])
    safe_set_local_optimizer_state(parameter, mine, key)
