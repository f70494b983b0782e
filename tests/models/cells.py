"""What every cell of the matrix must do: compute, pack, learn, be read back.

Enters: a cell, and an empty folder. Leaves: nothing; asserts.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from mllm.data.collate import collate
from mllm.data.packing import join
from mllm.models.multimodal import MultimodalLM
from mllm.train.losses import NextToken, model_inputs
from mllm.train.stage_folder import load_stage, save_stage
from mllm.train.trainable import LearningRates, choose_trainable
from mllm.types import Example
from models.matrix import Cell

CPU = torch.device("cpu")


def check(cell: Cell, folder: Path) -> None:
    model, examples = cell.model(), cell.examples()
    packed_is_separate(model, examples)
    learned = connector_alone_learns(model, examples)
    fresh = cell.model(seed=5)
    save_stage(folder, model, cell.processor(), "")
    load_stage(fresh, folder)
    assert loss_of(fresh, examples) == learned, "what was saved and read back says something else"


def packed_is_separate(model: MultimodalLM, examples: list[Example]) -> None:
    """In loss, and in the gradient of every part, to float32's rounding of the largest entry."""
    model.requires_grad_(True)
    (packed_loss, packed), (separate_loss, separate) = (
        loss_and_gradients(model, rows) for rows in ([examples], [[example] for example in examples])
    )
    assert torch.isfinite(packed_loss), packed_loss
    torch.testing.assert_close(packed_loss, separate_loss, rtol=1e-6, atol=0)
    assert {name.partition(".")[0] for name in separate} == {"vision_encoder", "connector", "llm"}
    largest = max(float(gradient.abs().max()) for gradient in separate.values())
    torch.testing.assert_close(packed, separate, rtol=1e-4, atol=1e-6 * largest)


def connector_alone_learns(model: MultimodalLM, examples: list[Example]) -> float:
    """The loss after one step."""
    model.zero_grad()
    choose_trainable(model, LearningRates(connector=1e-3), None)
    start = {key: value.clone() for key, value in model.state_dict().items()}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3)
    before, _ = loss_and_gradients(model, [examples])
    optimizer.step()
    moved = {key for key, value in model.state_dict().items() if not torch.equal(value, start[key])}
    assert moved, "nothing moved"
    assert all(key.startswith("connector.") for key in moved), moved
    after = loss_of(model, examples)
    assert after < float(before), "one step made it worse"
    return after


def loss_and_gradients(model: MultimodalLM, rows: list[list[Example]]) -> tuple[Tensor, dict[str, Tensor]]:
    """Summed over rows, each of them a batch. Not in training mode, in which a DINOv3 moves its patches at random;
    `choose_trainable` puts no frozen encoder into it."""
    objective = NextToken(model.eval())
    objective.zero_grad()
    loss = torch.stack([objective(**inputs(model, row)) for row in rows]).sum()
    loss.backward()
    return loss.detach(), {key: p.grad for key, p in model.named_parameters() if p.grad is not None}


@torch.no_grad()
def loss_of(model: MultimodalLM, examples: list[Example]) -> float:
    return float(NextToken(model.eval())(**inputs(model, examples)))


def inputs(model: MultimodalLM, row: list[Example]) -> dict[str, Tensor]:
    shape = (3, model.vision_encoder.grid.side, model.vision_encoder.grid.side)
    return model_inputs(collate([join(row, shape)], shape), CPU)
