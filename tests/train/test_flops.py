"""The operations that are counted from shapes are those that torch's own counter sees in a real step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, MixtralConfig

from conftest import make_model, make_processor, make_sample
from mllm.data.collate import collate
from mllm.data.packing import join
from mllm.models.connectors import LinearConnector, PixelShuffleConnector, QFormerConnector
from mllm.models.multimodal import MultimodalLM
from mllm.train.forecasting.flops import Cost, Work, cost_of, executed, linear_flops, needed, step_flops
from mllm.train.forecasting.peaks import known_peak, peak_flops
from mllm.train.losses import NextToken, model_inputs
from mllm.train.trainable import LearningRates, Lora, choose_trainable
from mllm.train.tuning.checkpointing import switch_on
from mllm.types import Batch

ALIGN, BOTH = LearningRates(connector=1e-3), LearningRates(connector=1e-3, llm=1e-3)
QFORMER = QFormerConnector(num_queries=4, hidden_size=16, num_layers=2, num_heads=2)


def batch_of(images: list[int], visual_tokens: int = 4) -> Batch:
    """Two rows of samples that have so many images each."""
    processor = make_processor(visual_tokens)
    examples = [processor(make_sample(seed, count, extra="more words " * seed)) for seed, count in enumerate(images)]
    rows = [join(examples[:2], processor.pixel_shape), join(examples[2:], processor.pixel_shape)]
    return collate(rows, processor.pixel_shape)


def chosen(rates: LearningRates, lora: Lora | None = None, **options: Any) -> MultimodalLM:
    model = make_model(**options)
    choose_trainable(model, rates, lora)
    return model


def seen(model: MultimodalLM, batch: Batch) -> float:
    """What torch counts in a forward and a backward pass; attention as plain products, which it knows on a CPU."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        NextToken(model)(**model_inputs(batch, torch.device("cpu"))).backward()
    return float(counter.get_total_flops())


CASES: dict[str, tuple[LearningRates, Lora | None, dict[str, Any]]] = {
    "align": (ALIGN, None, {}),
    "align, linear": (ALIGN, None, {"connector": LinearConnector()}),
    "align, pixel shuffle": (ALIGN, None, {"connector": PixelShuffleConnector()}),
    "align, qformer": (ALIGN, None, {"connector": QFORMER}),
    "align, qwen3, deep": (ALIGN, None, {"family": "qwen3", "num_hidden_layers": 4, "head_dim": 16}),
    "lora": (BOTH, Lora(rank=4), {}),
    "full": (BOTH, None, {"family": "qwen2"}),
    "full, tied": (BOTH, None, {"family": "qwen2", "tie_word_embeddings": True}),
    "all three": (LearningRates(1e-3, 1e-3, 1e-3), None, {}),
}


@pytest.mark.parametrize("case", CASES)
def test_cost_from_shapes_is_what_the_counter_sees_within_a_hundredth(case: str) -> None:
    rates, lora, options = CASES[case]
    model = chosen(rates, lora, **options)
    batch = batch_of([1, 3, 2, 1], visual_tokens=1 if "shuffle" in case else 4)
    assert cost_of(model).flops(executed(batch)) == pytest.approx(seen(model, batch), rel=0.01)


@pytest.mark.parametrize("case", ["align", "align, qformer", "lora", "all three"])
def test_what_checkpointing_computes_twice_counts_once(case: str) -> None:
    rates, lora, options = CASES[case]
    model = chosen(rates, lora, **options)
    plain = cost_of(model)
    switch_on(model, ["llm", "connector", "vision_encoder"])
    assert cost_of(model.train()) == plain
    switched = [module for module in model.modules() if getattr(module, "gradient_checkpointing", False)]
    assert switched
    assert model.connector.checkpointed


def test_frozen_weights_cost_four_operations_a_token_and_trained_ones_six() -> None:
    frozen, trained = cost_of(chosen(ALIGN)), cost_of(chosen(BOTH))
    decoder = make_model().llm.get_decoder()
    matrices = sum(p.numel() for p in decoder.layers.parameters() if p.ndim == 2)
    assert frozen.per_token == 4 * matrices
    assert trained.per_token == 6 * matrices
    assert frozen.per_supervised * 6 == trained.per_supervised * 4 == 24 * 384 * 32
    assert frozen.per_pair == trained.per_pair


def test_of_a_mixture_of_experts_a_token_pays_for_those_it_takes() -> None:
    sizes = {"vocab_size": 384, "hidden_size": 32, "num_hidden_layers": 1, "intermediate_size": 64}
    config = MixtralConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, num_local_experts=8)
    llm = AutoModelForCausalLM.from_config(config).requires_grad_(False)
    attention, router, expert = 3 * 32 * 32, 8 * 32, 3 * 32 * 64
    assert linear_flops(llm.get_decoder(), reached=True)[0] == 4 * (attention + router + 2 * expert)


def test_counting_leaves_the_model_as_it_was() -> None:
    model = chosen(BOTH)
    before = {name: (p.data_ptr(), p.requires_grad) for name, p in model.named_parameters()}
    state = torch.get_rng_state()
    cost_of(model)
    assert {name: (p.data_ptr(), p.requires_grad) for name, p in model.named_parameters()} == before
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), state)


def test_needed_work_is_the_samples_own_without_padding_and_pairs_across_samples() -> None:
    processor = make_processor()
    examples = [processor(make_sample(seed, 1, extra="words " * seed)) for seed in range(3)]
    rows = [join(examples[:2], processor.pixel_shape), join(examples[2:], processor.pixel_shape)]
    batch = collate(rows, processor.pixel_shape)
    lengths = [len(example.input_ids) for example in examples]
    work = needed(batch)
    assert batch["input_ids"].numel() > sum(lengths)  # the second row is padded
    assert work.tokens == sum(lengths)
    assert work.pairs == sum(n * (n + 1) // 2 for n in lengths)
    assert work.images == 3
    assert work.pairs < executed(batch).pairs


def test_a_step_needs_the_sum_of_its_micro_batches() -> None:
    cost, one, two = Cost(2.0, 3.0, 5.0, 7.0), batch_of([1, 2, 0, 1]), batch_of([0, 0, 0, 0])
    assert step_flops(cost, [one, two]) == cost.flops(needed(one)) + cost.flops(needed(two))
    assert cost.flops(Work(1, 1, 1, 1)) == 17.0


def test_peaks_are_found_by_the_names_that_drivers_tell() -> None:
    half = torch.bfloat16
    assert known_peak("NVIDIA H100 80GB HBM3", half) == 989e12
    assert known_peak("NVIDIA H100 PCIe", half) == 756e12
    assert known_peak("NVIDIA A100-SXM4-80GB", half) == 312e12
    assert known_peak("NVIDIA A100-SXM4-80GB", torch.float32) == 19.5e12
    assert known_peak("NVIDIA L40S", half) == 362e12
    assert known_peak("NVIDIA GeForce GTX 1080", half) is None


def test_a_device_without_a_data_sheet_is_measured() -> None:
    assert 1e8 < peak_flops(torch.device("cpu"), torch.float32) < 1e14
