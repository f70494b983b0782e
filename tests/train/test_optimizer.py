"""Muon behind the face of one optimiser."""

from __future__ import annotations

import copy

import torch
from torch import nn

from mllm.train.optimizer import make_optimizer


def groups(model: nn.Module) -> list[dict]:
    return [
        {"params": [model.weight], "lr": 0.1, "peak": 0.1, "weight_decay": 0.0, "part": "connector"},
        {"params": [model.bias], "lr": 0.1, "peak": 0.1, "weight_decay": 0.0, "part": "connector"},
    ]


def one_step(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
    inputs = torch.randn(4, 6, generator=torch.Generator().manual_seed(seed))
    model(inputs).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def make(seed: int = 0) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = nn.Linear(6, 3)
    return model, make_optimizer(groups(model), "muon")


def test_matrices_take_muons_step_and_vectors_adamws() -> None:
    model, optimizer = make()
    matrix = nn.Parameter(model.weight.detach().clone())
    vector = nn.Parameter(model.bias.detach().clone())
    one_step(model, optimizer, 1)
    inputs = torch.randn(4, 6, generator=torch.Generator().manual_seed(1))
    nn.functional.linear(inputs, matrix, vector).square().sum().backward()
    torch.optim.Muon([matrix], lr=0.1, weight_decay=0.0, adjust_lr_fn="match_rms_adamw").step()
    torch.optim.AdamW([vector], lr=0.1, weight_decay=0.0).step()
    torch.testing.assert_close(model.weight, matrix)
    torch.testing.assert_close(model.bias, vector)


def test_rate_set_on_a_group_reaches_its_part() -> None:
    model, optimizer = make()
    before = model.weight.detach().clone()
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    one_step(model, optimizer, 1)
    torch.testing.assert_close(model.weight, before, rtol=0, atol=0)


def test_saved_and_loaded_state_continues_the_same_steps() -> None:
    model, optimizer = make()
    one_step(model, optimizer, 1)
    other, other_optimizer = make(seed=5)
    other.load_state_dict(model.state_dict())
    other_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # as a file would: nothing shared
    one_step(model, optimizer, 2)
    one_step(other, other_optimizer, 2)
    torch.testing.assert_close(other.weight, model.weight, rtol=0, atol=0)
    torch.testing.assert_close(other.bias, model.bias, rtol=0, atol=0)
