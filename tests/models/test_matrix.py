"""Encoders x connectors x LLMs: every cell computes, packs, trains and is read back; the page tells who loads it.

The fast suite visits every encoder with every connector, the LLMs in turn; the long one every cell.
"""

from __future__ import annotations

from itertools import product
from pathlib import Path

import matrix
import pytest
import torch
from matrix import CONNECTORS, ENCODERS, LLMS, Cell
from torch import Tensor

from conftest import make_sample
from mllm.data.collate import collate
from mllm.data.packing import join
from mllm.models.multimodal import MultimodalLM
from mllm.train.losses import NextToken, model_inputs
from mllm.train.stage_folder import load_stage, save_stage
from mllm.train.trainable import LearningRates, choose_trainable
from mllm.types import Example

CPU = torch.device("cpu")
ALL = [Cell(*names) for names in product(ENCODERS, CONNECTORS, LLMS)]
FEW = [
    Cell(encoder, connector, LLMS[number % len(LLMS)])
    for number, (encoder, connector) in enumerate(product(ENCODERS, CONNECTORS))
]


def name(cell: Cell) -> str:
    return f"{cell.encoder}-{cell.connector}-{cell.llm}"


@pytest.mark.parametrize("cell", FEW, ids=name)
def test_cell_computes_packs_trains_and_is_read_back(cell: Cell, tmp_path: Path) -> None:
    check(cell, tmp_path)


@pytest.mark.long
@pytest.mark.parametrize("cell", [cell for cell in ALL if cell not in FEW], ids=name)
def test_every_other_cell_does_too(cell: Cell, tmp_path: Path) -> None:
    check(cell, tmp_path)


def check(cell: Cell, folder: Path) -> None:
    model = cell.model()
    processor = cell.processor(model.vision_encoder)
    examples = [processor(make_sample(seed, images)) for seed, images in ((1, 1), (2, 0), (3, 2))]
    packed_is_separate(model, examples)
    connector_alone_learns(model, examples)
    fresh = cell.model(seed=5)  # frozen parts come from their ids, here from the trained model
    fresh.vision_encoder.load_state_dict(model.vision_encoder.state_dict())
    fresh.llm.load_state_dict(model.llm.state_dict())
    before = loss_of(fresh, examples)
    save_stage(folder, model, processor, "")
    load_stage(fresh, folder)
    assert float(loss_of(fresh, examples)) == float(loss_of(model, examples)) != float(before)


def packed_is_separate(model: MultimodalLM, examples: list[Example]) -> None:
    """In loss, and in the gradient of every part, to float32's rounding of the largest entry."""
    (packed_loss, packed), (separate_loss, separate) = (
        loss_and_gradients(model, rows) for rows in ([examples], [[example] for example in examples])
    )
    assert torch.isfinite(packed_loss)
    torch.testing.assert_close(packed_loss, separate_loss, rtol=1e-6, atol=0)
    largest = max(float(gradient.abs().max()) for gradient in separate.values())
    torch.testing.assert_close(packed, separate, rtol=1e-4, atol=1e-6 * largest)


def connector_alone_learns(model: MultimodalLM, examples: list[Example]) -> None:
    model.requires_grad_(False).zero_grad()
    choose_trainable(model, LearningRates(connector=1e-3), None)
    start = {key: value.clone() for key, value in model.state_dict().items()}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer, before = torch.optim.AdamW(trained, lr=1e-3), loss_of(model, examples)
    loss_and_gradients(model, [examples])
    optimizer.step()
    moved = {key for key, value in model.state_dict().items() if not torch.equal(value, start[key])}
    assert moved
    assert all(key.startswith("connector.") for key in moved)
    assert loss_of(model, examples) < before


def loss_and_gradients(model: MultimodalLM, rows: list[list[Example]]) -> tuple[Tensor, dict[str, Tensor]]:
    """Summed over rows, each of them a batch. Not in training mode, in which a DINOv3 moves its patches at random;
    `choose_trainable` puts no frozen encoder into it."""
    objective = NextToken(model.eval())
    objective.zero_grad()
    loss = torch.stack([objective(**inputs(model, row)) for row in rows]).sum()
    loss.backward()
    return loss.detach(), {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}


@torch.no_grad()
def loss_of(model: MultimodalLM, examples: list[Example]) -> Tensor:
    return NextToken(model.eval())(**inputs(model, examples))


def inputs(model: MultimodalLM, row: list[Example]) -> dict[str, Tensor]:
    shape = (3, model.vision_encoder.grid.side, model.vision_encoder.grid.side)
    return model_inputs(collate([join(row, shape)], shape), CPU)


# ---------------------------------------------------------------- who loads it


def test_page_says_what_info_says() -> None:
    _, _, rest = matrix.README.read_text().partition(matrix.BEGIN)
    told, found, _ = rest.partition(matrix.END)
    assert found
    assert told == matrix.table(), "python tests/models/matrix.py writes it anew"


def test_what_stands_in_the_way_of_a_model_is_what_its_parts_bring_each() -> None:
    for cell in FEW:
        parts_alone_decide(cell)


@pytest.mark.long
def test_the_same_of_every_cell() -> None:
    for cell in ALL:
        parts_alone_decide(cell)


def parts_alone_decide(cell: Cell) -> None:
    alone = matrix.verdicts()
    own = [alone[part, getattr(cell, part)] for part in matrix.PARTS]
    found = matrix.verdict(cell.model())
    assert found.stock == frozenset().union(*[each.stock for each in own])
    assert found.llama_cpp == frozenset().union(*[each.llama_cpp for each in own])
