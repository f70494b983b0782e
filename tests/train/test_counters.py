"""What a step computes and keeps, counted and held: bounds that no machine's mood can move."""

from __future__ import annotations

import sys
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator

sys.path.append(str(Path(__file__).parents[2] / "recipes"))

from benchmarks import naive, product
from benchmarks.counters import bytes_for_backward, flops, outside, rows_of_words
from benchmarks.drawn_training import Drawing, draw
from benchmarks.sizes import LLMS, draw_model
from conftest import make_model, make_processor, make_sample
from mllm.data.collate import collate
from mllm.data.packing import join, pack
from mllm.models.multimodal import MultimodalLM
from mllm.train import head_loss as head_room
from mllm.train.forecasting.flops import cost_of, needed
from mllm.train.head_loss import head_loss
from mllm.train.losses import NextToken, model_inputs, num_supervised
from mllm.train.step import optimise
from mllm.train.trainable import LearningRates, choose_trainable
from mllm.types import Batch

CPU = torch.device("cpu")
LLM, WORDS, VISUAL = "small", LLMS["small"]["vocab_size"], 16
"""The head is a quarter of this LLM, as of Qwen2.5-0.5B."""
SHRINK = 36
"""As many times fewer visual tokens than the 576 of the mix."""
SAMPLES, BATCH = 64, 16
ALIGN, WHOLE = LearningRates(connector=1e-3), LearningRates(connector=1e-3, llm=1e-3)


@cache
def drawn() -> tuple[Any, Any]:
    return draw(Drawing("instruct", VISUAL, 56, WORDS, samples=SAMPLES, shrink=SHRINK))


def model_of(rates: LearningRates = ALIGN) -> MultimodalLM:
    model = draw_model(LLM, "tiny", CPU, torch.float32)
    choose_trainable(model, rates, None)
    return model


@cache
def packed(samples: int = SAMPLES, least: float = 0.0) -> Batch:
    """The samples of the mix in rows of a length that suits them, all as one micro-batch; of the rows those that are
    full to a share."""
    index, processor = drawn()
    length, _ = product.layout(index.length, 512)
    lengths, examples = index.length[:samples].tolist(), []
    for number in range(samples):
        sample = index.sample(number)
        examples.append(processor.example(sample, *processor.tokens(sample)))
    groups = [group for group in pack(lengths, length) if sum(lengths[i] for i in group) >= least * length]
    rows = [join([examples[i] for i in group], processor.pixel_shape) for group in groups]
    return collate(rows, processor.pixel_shape)


def padded(model: MultimodalLM, samples: int = SAMPLES) -> list[naive.Batch]:
    """The same samples, sixteen at a time."""
    index, processor = drawn()
    items = naive.Samples(index, processor, model.vision_encoder.normalisation)
    return [naive.padded([items[i] for i in range(start, start + BATCH)]) for start in range(0, samples, BATCH)]


def forward_packed(model: MultimodalLM, samples: int = SAMPLES) -> torch.Tensor:
    return NextToken(model)(**model_inputs(packed(samples), CPU))


def matrices(model: MultimodalLM) -> int:
    """N, counted by hand."""
    return sum(p.numel() for p in model.llm.model.layers.parameters() if p.ndim == 2)


def test_operations_a_real_token_are_four_a_weight_and_four_a_supervised_one_in_the_head() -> None:
    """Predicted: 4N + 4H * supervised share + attention, of the tokens that are no padding."""
    model, batch = model_of(), packed(least=0.99)  # the last row of an epoch is not full
    work, config = needed(batch), model.llm.config
    rows, length = batch["input_ids"].shape
    encoder_and_connector = cost_of(model).per_image * len(batch["pixel_values"])
    found = flops(lambda: NextToken(model)(**model_inputs(batch, CPU)).backward()) - encoder_and_connector
    attention = 12 * rows * length**2 * config.hidden_size * config.num_hidden_layers / work.tokens
    share = work.supervised / work.tokens
    predicted = 4 * matrices(model) + 4 * WORDS * config.hidden_size * share + attention
    assert rows >= 8
    assert found / work.tokens == pytest.approx(predicted, rel=0.02)


def test_padding_and_unneeded_logits_cost_at_least_seventy_percent_more() -> None:
    """Without attention: as plain products it is that of whole rows here, of the samples alone in a varlen kernel."""
    model = model_of()
    tokens = needed(packed()).tokens
    assert tokens == sum(int(batch["attention_mask"].sum()) for batch in padded(model))
    ours = flops(lambda: forward_packed(model).backward(), attention=False)
    llava = naive.NaiveLlava(model)
    theirs = sum(flops(lambda batch=batch: llava(**batch).backward(), attention=False) for batch in padded(model))
    assert theirs / ours >= 1.7


def test_a_frozen_llm_costs_two_thirds_of_a_trained_one() -> None:
    found = []
    for rates in (ALIGN, WHOLE):
        model = model_of(rates)
        states = torch.randn(2, 128, model.llm.config.hidden_size, requires_grad=True)
        found.append(flops(partial(llm_alone, model, states), attention=False))
    assert found[0] / found[1] == pytest.approx(0.667, abs=0.005)


def llm_alone(model: MultimodalLM, embeddings: torch.Tensor) -> None:
    """Forward and backward of layers and head, every token supervised."""
    states = model.llm.get_decoder()(inputs_embeds=embeddings, use_cache=False).last_hidden_state.flatten(0, 1)
    head_loss(model, states, torch.arange(len(states)), torch.ones(len(states)))[0].backward()


def test_what_waits_for_the_backward_pass_is_less_where_weights_are_frozen_and_rows_packed() -> None:
    frozen, trained = model_of(), model_of(WHOLE)
    kept = {name: bytes_for_backward(partial(forward_packed, m), m) for name, m in (("f", frozen), ("t", trained))}
    assert kept["f"] <= 0.85 * kept["t"]
    llava = naive.NaiveLlava(frozen)
    theirs = sum(bytes_for_backward(lambda batch=batch: llava(**batch), frozen) for batch in padded(frozen))
    assert kept["f"] <= 0.80 * theirs


@pytest.mark.parametrize("rates", [ALIGN, WHOLE], ids=["frozen", "trained"])
def test_no_tensor_of_a_step_is_wider_than_a_chunk_of_supervised_rows(
    rates: LearningRates, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(head_room, "ROWS", 48)
    model = model_of(rates)
    supervised = num_supervised(packed())
    assert supervised > 3 * 48
    assert 0 < rows_of_words(lambda: forward_packed(model).backward(), WORDS, model) <= 48
    plain = product.AllLogits(model)
    everywhere = rows_of_words(lambda: plain(**model_inputs(packed(), CPU)).backward(), WORDS, model)
    assert everywhere >= packed()["input_ids"][:, 1:].numel()  # the counter sees what there is


def test_no_logits_wait_for_the_backward_pass() -> None:
    model = model_of()
    kept = bytes_for_backward(partial(forward_packed, model), model)
    plain = bytes_for_backward(lambda: product.AllLogits(model)(**model_inputs(packed(), CPU)), model)
    logits = packed()["input_ids"][:, 1:].numel() * WORDS * 4
    assert plain - kept > 0.9 * logits


def test_packed_loss_and_gradient_are_those_of_the_naive_way() -> None:
    model = model_of()
    found = []
    ours = forward_packed(model, BATCH) / num_supervised(packed(BATCH))
    theirs = naive.NaiveLlava(model)(**padded(model, BATCH)[0])
    for loss in (ours, theirs):
        model.zero_grad()
        loss.backward()
        found.append(torch.cat([p.grad.flatten() for p in model.connector.parameters() if p.grad is not None]))
    assert float(ours.detach()) == pytest.approx(float(theirs.detach()), rel=1e-5)
    assert (found[0] - found[1]).norm() <= 1e-5 * found[1].norm()


def test_what_happens_beside_the_model_does_not_grow_with_the_number_of_samples() -> None:
    processor, found = make_processor(), []
    for samples in (2, 8):
        examples = [processor(make_sample(i, extra="word " * (48 // samples))) for i in range(samples)]
        batch = collate([join(examples, processor.pixel_shape)], processor.pixel_shape)
        model = make_model()
        choose_trainable(model, ALIGN, None)
        objective, optimizer = NextToken(model), torch.optim.SGD(model.connector.parameters(), 1e-3)
        accelerator = Accelerator(cpu=True)
        step = partial(optimise, accelerator, objective, accelerator.prepare(optimizer), [batch], 1.0)
        outside(step, objective)  # what is set up once
        found.append(outside(step, objective))
    assert found[0] == found[1]
    assert min(found[0].values()) > 10
