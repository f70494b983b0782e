"""What the two trainings share: the steps, the optimisers, the order of the data.

Enters: a model and what its next loss is. Leaves: the trained model, and how it went.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

Report = dict[str, float]


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def fit(model: nn.Module, next_loss: Callable[[], Tensor], steps: int, title: str) -> Report:
    """Take `steps` on what `next_loss` returns; the rates warm up, then fall as a cosine."""
    torch.set_num_threads(1)
    optimizers = make_optimizers(model)
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: warm_cosine((step + 1) / steps))
        for optimizer in optimizers
    ]
    started = time.perf_counter()
    smooth = math.nan
    for step in range(1, steps + 1):
        loss = next_loss()
        model.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for stepper in (*optimizers, *schedules):
            stepper.step()
        smooth = loss.item() if step == 1 else 0.95 * smooth + 0.05 * loss.item()
        if step % 50 == 0 or step == steps:
            seconds = time.perf_counter() - started
            print(f"{title:14} step {step:5}/{steps}  loss {smooth:.3f}  {seconds:4.0f} s", flush=True)
    return {"steps": steps, "loss": smooth, "seconds": time.perf_counter() - started}


def make_optimizers(model: nn.Module) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the layers, which learns small models in fewer steps; AdamW for all else."""
    inner = {id(p) for name, p in model.named_parameters() if p.ndim == 2 and "layers." in name}
    matrices = [p for p in model.parameters() if id(p) in inner]
    others = [p for p in model.parameters() if id(p) not in inner]
    return [
        torch.optim.Muon(matrices, lr=0.02, weight_decay=0.05),
        torch.optim.AdamW(others, lr=2e-3, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def warm_cosine(done: float, warm_up: float = 0.05) -> float:
    """The share of the full rate when `done` (0 to 1) of the training is behind."""
    return min(done / warm_up, 0.5 * (1 + math.cos(math.pi * done)))


def batches(size: int, batch: int) -> Iterator[Tensor]:
    """Indices [batch] for ever, each epoch in a new order."""
    generator = torch.Generator().manual_seed(0)
    while True:
        yield from torch.randperm(size, generator=generator)[: size - size % batch].split(batch)
