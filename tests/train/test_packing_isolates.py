"""Contract 2: packed rows equal separate samples, in loss, gradient and logits."""

from __future__ import annotations

import pytest
import torch

from conftest import make_model, make_processor, make_sample
from mllm.data.collate import collate
from mllm.data.packing import join
from mllm.train.losses import NextToken, model_inputs
from mllm.types import Batch, Example, Mark, Message

CPU = torch.device("cpu")


def examples() -> list[Example]:
    """An image sample, a text sample, two images, a longer one."""
    processor = make_processor()
    samples = [
        make_sample(1),
        make_sample(2, num_images=0, turns=2),
        make_sample(3, num_images=2),
        make_sample(4, turns=3, extra="and a few more words"),
    ]
    return [processor(sample) for sample in samples]


def batch_of(groups: list[list[Example]]) -> Batch:
    shape = (3, 28, 28)
    return collate([join(group, shape) for group in groups], shape)


def loss_and_gradients(model: torch.nn.Module, batches: list[Batch]) -> tuple[float, dict[str, torch.Tensor]]:
    objective = NextToken(model)
    objective.zero_grad()
    loss = torch.stack([objective(**model_inputs(batch, CPU)) for batch in batches]).sum()
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in objective.named_parameters() if p.grad is not None}
    return float(loss.detach()), gradients


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_packed_loss_and_gradient_equal_separate_ones(family: str, attention: str, checkpointing: bool) -> None:
    model = make_model(family, attention).train()
    if checkpointing:
        model.llm.gradient_checkpointing_enable({"use_reentrant": False})
    samples = examples()
    packed_loss, packed = loss_and_gradients(model, [batch_of([samples])])
    separate_loss, separate = loss_and_gradients(model, [batch_of([[sample]]) for sample in samples])
    assert packed_loss == pytest.approx(separate_loss, rel=1e-6)
    assert packed.keys() == separate.keys()
    for name in packed:
        torch.testing.assert_close(
            packed[name], separate[name], rtol=1e-4, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_two_rows_equal_one_row() -> None:
    model, samples = make_model(), examples()
    one, _ = loss_and_gradients(model, [batch_of([samples])])
    two, _ = loss_and_gradients(model, [batch_of([samples[:1], samples[1:]])])
    assert one == pytest.approx(two, rel=1e-6)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_perturbing_one_sample_moves_no_logit_of_its_neighbours(family: str, attention: str) -> None:
    model, processor = make_model(family, attention).eval(), make_processor()
    before = examples()
    other = make_sample(9, turns=2, extra="quite another text")
    other.messages[0] = Message("user", [Mark.IMAGE, "what now?"])
    changed = [before[0], processor(other), *before[2:]]
    with torch.no_grad():
        logits = [row_logits(model, [row]) for row in (before, changed)]
    starts = [sum(len(e.input_ids) for e in row[:2]) for row in (before, changed)]
    first = len(before[0].input_ids)
    torch.testing.assert_close(logits[0][:first], logits[1][:first], rtol=0, atol=1e-5)
    rest = sum(len(example.input_ids) for example in before[2:])
    for_the_rest = [each[start : start + rest] for each, start in zip(logits, starts, strict=True)]
    torch.testing.assert_close(*for_the_rest, rtol=0, atol=1e-5)


def row_logits(model: torch.nn.Module, groups: list[list[Example]]) -> torch.Tensor:
    inputs = model_inputs(batch_of(groups), CPU)
    del inputs["labels"]
    return model.logits(model(**inputs))[0]
