"""The head and its loss as one operation: what the plain way gives, and never more logits than a chunk has rows."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from conftest import LLM_CONFIGS, make_model
from mllm.models.multimodal import MultimodalLM
from mllm.train import head_loss as room
from mllm.train.head_loss import chunks, head_loss
from mllm.train.trainable import LearningRates, Lora, choose_trainable

ROWS, WIDTH, WORDS = 23, 32, 384
UPSTREAM = 1 / 37.3


def case(model: MultimodalLM, rows: int = ROWS) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(0)
    width = model.llm.get_input_embeddings().weight.dtype
    return {
        "states": torch.randn(rows, WIDTH, generator=draw).to(width).requires_grad_(),
        "targets": torch.randint(0, WORDS, (rows,), generator=draw),
        "weights": torch.rand(rows, generator=draw) + 0.5,
    }


def plain(model: MultimodalLM, states: Tensor, targets: Tensor, weights: Tensor, **_: Any) -> tuple[Tensor, Tensor]:
    losses = cross_entropy(model.logits(states).float(), targets, reduction="none")
    return (losses * weights).sum(), losses.detach()


def outcome(way: Any, model: MultimodalLM, inputs: dict[str, Tensor], **options: Any) -> dict[str, Tensor]:
    """Sum, losses and every gradient."""
    model.zero_grad()
    inputs["states"].grad = None
    total, losses = way(model, **inputs, **options)
    (total * UPSTREAM).backward()
    found = {name: p.grad for name, p in model.llm.get_output_embeddings().named_parameters() if p.grad is not None}
    assert inputs["states"].grad is not None
    return {"sum": total.detach(), "losses": losses, "states": inputs["states"].grad, **found}


def assert_equal(ours: dict[str, Tensor], theirs: dict[str, Tensor], **tolerance: float) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, msg=lambda m, name=name: f"{name}: {m}", **tolerance)


def model_of(family: str = "llama", trained: bool = True, bias: bool = False, **llm: Any) -> MultimodalLM:
    model = make_model(family, "eager", **llm)
    if bias:
        model.llm.lm_head.bias = nn.Parameter(torch.randn(WORDS))
    model.llm.requires_grad_(trained)
    return model


SCALED = {"cohere": {"logit_scale": 0.0625}, "granite": {"logits_scaling": 8.0}}


@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
@pytest.mark.parametrize("family", [*LLM_CONFIGS, *SCALED])
def test_one_chunk_has_the_bits_of_the_plain_way(family: str, trained: bool) -> None:
    model = model_of(family if family in LLM_CONFIGS else "llama", trained)
    for name, value in SCALED.get(family, {}).items():
        setattr(model.llm.config, name, value)
    inputs = case(model)
    ours = outcome(head_loss, model, inputs, upstream=UPSTREAM)
    assert_equal(ours, outcome(plain, model, inputs), rtol=0, atol=0)
    assert ("weight" in ours) is trained


@pytest.mark.parametrize("upstream", [1.0, UPSTREAM])
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
def test_chunks_slices_and_another_gradient_from_behind_change_rounding_alone(
    monkeypatch: pytest.MonkeyPatch, bias: bool, upstream: float
) -> None:
    monkeypatch.setattr(room, "ROWS", 8)
    monkeypatch.setattr(room, "FLOAT32_BYTES", 3 * 4 * WORDS)
    model = model_of(bias=bias)
    inputs = case(model)
    ours = outcome(head_loss, model, inputs, upstream=upstream)
    assert_equal(ours, outcome(plain, model, inputs), rtol=2e-6, atol=1e-8)
    assert ("bias" in ours) is bias


def test_tied_embeddings_get_the_sum_of_both_gradients() -> None:
    model = model_of(tie_word_embeddings=True)
    table, inputs = model.llm.get_input_embeddings(), case(model)
    assert model.llm.get_output_embeddings().weight is table.weight
    found = []
    for way in (head_loss, plain):
        model.zero_grad()
        total, _ = way(
            model, table(inputs["targets"]) + inputs["states"].detach(), inputs["targets"], inputs["weights"]
        )
        total.backward()
        found.append(table.weight.grad)
    torch.testing.assert_close(*found, rtol=0, atol=0)


@pytest.mark.parametrize("autocast", [False, True], ids=["bfloat16", "autocast"])
def test_half_precision_is_that_of_the_plain_way(autocast: bool) -> None:
    model = model_of()
    if not autocast:
        model.to(torch.bfloat16)
    inputs = case(model)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        ours, theirs = (outcome(way, model, inputs) for way in (head_loss, plain))
    assert ours["sum"].dtype == torch.float32
    assert ours["states"].dtype == inputs["states"].dtype
    assert_equal(ours, theirs, rtol=1e-2, atol=1e-3)
    assert torch.equal(ours["losses"], theirs["losses"])


def test_without_a_gradient_there_is_none_and_the_same_loss() -> None:
    model = model_of()
    inputs = case(model)
    with torch.no_grad():
        total, losses = head_loss(model, **inputs)
    assert not total.requires_grad
    assert not losses.requires_grad
    assert torch.equal(total, plain(model, **inputs)[0])


def test_no_row_costs_nothing_and_has_a_gradient_of_zero() -> None:
    model = model_of()
    ours = outcome(head_loss, model, case(model, rows=0))
    assert float(ours["sum"]) == 0.0
    assert ours["states"].shape == (0, WIDTH)


def test_a_kernel_that_cannot_be_built_is_done_without_and_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "find_spec", lambda name: name)
    monkeypatch.setitem(sys.modules, "mllm.train.kernels.entropy", None)
    with pytest.warns(UserWarning, match="computed without Triton"):
        assert room.kernel.__wrapped__(torch.device("cpu")) is None


def test_chunks_are_alike_and_neither_small_nor_large() -> None:
    assert chunks(0) == []
    assert chunks(4096) == [slice(0, 4096)]
    for rows in (4097, 8192, 9000, 50_000):
        sizes = [part.stop - part.start for part in chunks(rows)]
        assert sum(sizes) == rows
        assert 2048 <= max(sizes) <= 4096
        assert chunks(rows)[0].start == 0
        assert all(one.stop == other.start for one, other in zip(chunks(rows), chunks(rows)[1:], strict=False))


@pytest.mark.parametrize("kind", ["hook", "own class", "adapter on the layers"])
def test_a_head_that_somebody_wants_to_hear_called_is_called(kind: str) -> None:
    model, calls = model_of(), []
    head = model.llm.get_output_embeddings()
    if kind == "hook":
        head.register_forward_hook(lambda *_: calls.append(1))
    elif kind == "own class":

        class Other(nn.Linear):
            def forward(self, states: Tensor) -> Tensor:
                calls.append(1)
                return super().forward(states)

        head.__class__ = Other
    else:
        choose_trainable(model, LearningRates(llm=1e-3), Lora(rank=2))
        assert room.is_plain(model.llm.get_output_embeddings())  # the head itself has no adapter
        calls.append(1)
    inputs = case(model)
    ours = outcome(head_loss, model, inputs, upstream=UPSTREAM)
    assert calls == [1]
    assert_equal(ours, outcome(plain, model, inputs), rtol=0, atol=0)
