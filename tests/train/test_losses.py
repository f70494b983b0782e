"""The loss is a plain sum of cross entropies over supervised positions, and nothing more is ever computed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy

from conftest import make_model, make_processor, make_sample
from mllm.data.collate import collate
from mllm.data.packing import join
from mllm.train.losses import NextToken, Reduction, model_inputs, num_supervised, supervised, weight_sum
from mllm.types import IGNORE_INDEX, Batch

CPU, SHAPE = torch.device("cpu"), (3, 28, 28)


def batch(rows: int = 2) -> Batch:
    processor = make_processor()
    groups = [[make_sample(2 * r), make_sample(2 * r + 1, num_images=r % 3, turns=2)] for r in range(rows)]
    return collate([join([processor(sample) for sample in group], SHAPE) for group in groups], SHAPE)


def test_summed_loss_equals_plain_cross_entropy_of_full_logits() -> None:
    model, one = make_model().eval(), batch()
    inputs = model_inputs(one, CPU)
    labels = inputs.pop("labels")
    with torch.no_grad():
        ours = NextToken(model)(labels=labels, **inputs)
        logits = model.logits(model(**inputs))  # [B, S, vocabulary]
        plain = cross_entropy(
            logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORE_INDEX, reduction="sum"
        )
    torch.testing.assert_close(ours, plain, rtol=1e-6, atol=0)
    assert num_supervised(one) == int((labels[:, 1:] != IGNORE_INDEX).sum()) > 0


def test_no_logits_are_computed_beyond_the_supervised_positions() -> None:
    model, one, shapes = make_model(), batch(), []
    model.llm.get_output_embeddings().register_forward_hook(lambda _m, _i, out: shapes.append(tuple(out.shape)))
    NextToken(model)(**model_inputs(one, CPU)).backward()
    assert shapes == [(num_supervised(one), 384)]


def test_batch_without_supervision_costs_nothing_and_has_a_gradient_of_zero() -> None:
    model, one = make_model(), batch()
    one["labels"] = torch.full_like(one["labels"], IGNORE_INDEX)
    loss = NextToken(model)(**model_inputs(one, CPU))
    loss.backward()
    assert num_supervised(one) == 0
    assert float(loss.detach()) == 0.0
    gradients = {name: p.grad for name, p in model.connector.named_parameters()}
    assert all(g is not None and not g.any() for g in gradients.values()), gradients


def test_last_position_predicts_nothing_and_the_first_is_predicted_by_nothing() -> None:
    where, targets = supervised(torch.tensor([[7, IGNORE_INDEX, 8, 9]]))
    assert where.tolist() == [[False, True, True]]
    assert targets.tolist() == [8, 9]


def test_loss_is_float32_under_half_precision() -> None:
    model, one = make_model().bfloat16(), batch()
    assert NextToken(model)(**model_inputs(one, CPU)).dtype == torch.float32


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_padding_to_a_longer_row_changes_no_loss(family: str) -> None:
    model, inputs = make_model(family).eval(), model_inputs(batch(), CPU)
    with torch.no_grad():
        short = NextToken(model)(**inputs)
        for name, fill in (("input_ids", 0), ("labels", IGNORE_INDEX), ("position_ids", 0)):
            inputs[name] = torch.nn.functional.pad(inputs[name], (0, 24), value=fill)
        torch.testing.assert_close(NextToken(model)(**inputs), short, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("reduction", "by_definition"),
    [("token", sum), ("sample", len), ("sqrt", lambda counts: sum(n**0.5 for n in counts))],
)
def test_weights_of_a_packed_row_are_those_of_its_samples(reduction: Reduction, by_definition: Any) -> None:
    processor = make_processor()
    examples = [processor(make_sample(i, num_images=i % 3, extra="word " * i)) for i in range(4)]
    counts = [num_supervised(collate([join([example], SHAPE)], SHAPE)) for example in examples]
    packed = collate([join(examples[:3], SHAPE), join(examples[3:], SHAPE)], SHAPE)
    assert len(set(counts)) > 1
    assert weight_sum(packed, reduction) == pytest.approx(by_definition(counts), rel=1e-6)


def test_every_sample_counts_alike_where_samples_are_averaged() -> None:
    processor, model = make_processor(), make_model()
    alone = [collate([join([processor(make_sample(i, extra="word " * (9 * i)))], SHAPE)], SHAPE) for i in range(3)]
    packed = collate([join([processor(make_sample(i, extra="word " * (9 * i))) for i in range(3)], SHAPE)], SHAPE)
    means = [NextToken(model)(**model_inputs(one, CPU)) / num_supervised(one) for one in alone]
    torch.testing.assert_close(
        NextToken(model)(**model_inputs(packed, CPU), reduction="sample"), sum(means), rtol=1e-5, atol=0
    )
