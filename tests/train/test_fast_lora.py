"""LoRA in half precision by the short way: what peft computes, and its files."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from peft import PeftModel
from torch import nn

from conftest import make_model, make_processor, make_sample, write_llava
from mllm.data.collate import collate
from mllm.data.packing import join
from mllm.models.multimodal import MultimodalLM
from mllm.train.losses import NextToken, model_inputs
from mllm.train.stage_folder import save_stage
from mllm.train.trainable import LearningRates, Lora, choose_trainable, set_mode, trained_weights
from mllm.train.tuning import fast_lora, fp8
from runs import metrics, run, settings

RATES = LearningRates(connector=1e-3, llm=1e-3, vision_encoder=1e-3)
LORA = Lora(rank=4, alpha=8)


def adapted(lora: Lora = LORA, vision_lora: Lora | None = LORA, family: str = "llama") -> MultimodalLM:
    model = make_model(family)
    torch.manual_seed(5)
    rates = RATES if vision_lora else LearningRates(connector=1e-3, llm=1e-3)
    choose_trainable(model, rates, lora, vision_lora)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # zero where an adapter begins, so that nothing would come through
            nn.init.normal_(parameter, std=0.1)
    set_mode(model)
    return model


def inputs() -> dict[str, Any]:
    processor = make_processor()
    examples = [processor(make_sample(i, num_images=1 + i % 2)) for i in range(4)]
    return model_inputs(collate([join(examples, processor.pixel_shape)], processor.pixel_shape), torch.device("cpu"))


def outcome(model: MultimodalLM, half: bool) -> dict[str, torch.Tensor]:
    """Loss and every gradient."""
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        loss = NextToken(model)(**inputs())
    loss.backward()
    gradients = {name: p.grad for name, p in trained_weights(model).items() if p.grad is not None}
    return {"loss": loss.detach(), **gradients}


def distance(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).norm() / other.norm().clamp(min=1e-12))


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt_neox"])
def test_in_float32_it_is_pefts_own_result_to_rounding(family: str) -> None:
    plain, fast = adapted(family=family), adapted(family=family)
    assert fast_lora.convert(fast) == sum(hasattr(m, "lora_A") for m in plain.modules()) > 0
    theirs, ours = outcome(plain, False), outcome(fast, False)
    assert theirs.keys() == ours.keys() == {"loss", *trained_weights(plain)}
    for name, value in theirs.items():
        assert distance(ours[name], value) < 2e-5, name


def test_under_autocast_it_is_as_near_to_float32_as_peft_is() -> None:
    exact, plain, fast = outcome(adapted(), False), adapted(), adapted()
    fast_lora.convert(fast)
    theirs, ours = outcome(plain, True), outcome(fast, True)
    far = {name: (distance(ours[name], value), distance(theirs[name], value)) for name, value in exact.items()}
    assert sum(one for one, _ in far.values()) < 1.1 * sum(other for _, other in far.values())


def test_layers_of_one_parent_share_their_first_product() -> None:
    model, products = adapted(vision_lora=None), []
    fast_lora.convert(model)
    real = fast_lora.linear

    def counted(rows: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
        products.append(len(matrix))
        return real(rows, matrix)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fast_lora, "linear", counted)
        outcome(model, True)
    assert products == [3 * 4, 4, 2 * 4, 4] * 2  # q k v, o, gate up, down
    assert all(m.shared.states is None for m in model.modules() if hasattr(m, "shared"))  # nothing is held


@pytest.mark.parametrize("checkpointing", [False, True])
def test_layers_computed_again_have_the_same_gradient(checkpointing: bool) -> None:
    plain, again = adapted(vision_lora=None), adapted(vision_lora=None)
    for model in (plain, again):
        fast_lora.convert(model)
    again.llm.gradient_checkpointing_enable({"use_reentrant": False})
    one, two = outcome(plain, True), outcome(again, True)
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_without_a_gradient_peft_computes() -> None:
    plain, fast = adapted(), adapted()
    fast_lora.convert(fast)
    with torch.no_grad():
        assert torch.equal(*(NextToken(model)(**inputs()) for model in (plain, fast)))


@pytest.mark.parametrize("lora", [Lora(rank=4, dropout=0.1), Lora(rank=4, dora=True)], ids=["dropout", "dora"])
def test_what_is_not_plain_lora_is_left_to_peft(lora: Lora) -> None:
    assert fast_lora.convert(adapted(lora, vision_lora=None)) == 0


def test_rank_stabilised_scale_is_kept() -> None:
    plain, fast = (adapted(Lora(rank=4, alpha=8, rslora=True), None) for _ in range(2))
    assert fast_lora.convert(fast) == 14
    assert distance(outcome(fast, False)["loss"], outcome(plain, False)["loss"]) < 1e-6


def test_base_may_be_of_eight_bits() -> None:
    one, two = adapted(vision_lora=None), adapted(vision_lora=None)
    for model in (one, two):
        assert fp8.convert(model) == 14
    assert fast_lora.convert(two) == 14
    theirs, ours = outcome(one, False), outcome(two, False)
    assert all(distance(ours[name], value) < 0.05 for name, value in theirs.items())


@pytest.fixture
def in_bfloat16() -> Iterator[Accelerator]:
    """accelerate keeps the precision of a process: here for one test alone."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield Accelerator(cpu=True, mixed_precision="bf16")
    AcceleratorState._reset_state(reset_partial_state=True)


def test_a_run_in_bfloat16_takes_it_and_writes_pefts_files(tmp_path: Path, in_bfloat16: Accelerator) -> None:
    data, losses = write_llava(tmp_path), {}
    for name in ("fast", "peft"):
        train = settings(tmp_path / name, learning_rate=LearningRates(connector=1e-2, llm=1e-2), lora=LORA)
        train.mixed_precision = "bf16"
        model = adapted(vision_lora=None)
        with pytest.MonkeyPatch.context() as patch:
            if name == "peft":
                patch.setattr(fast_lora, "convert", lambda model: 0)
            run(data, train, model, accelerator=in_bfloat16)
        save_stage(train.output_dir, model, make_processor(), "model: {}\n")
        losses[name] = [loss for (loss,) in metrics(train.output_dir, "loss")]
    assert losses["fast"] == pytest.approx(losses["peft"], rel=5e-3)
    again = PeftModel.from_pretrained(make_model().llm, tmp_path / "fast" / "adapter")
    assert {n for n, _ in again.named_parameters()} == {n for n, _ in adapted(vision_lora=None).llm.named_parameters()}


def test_a_training_in_float32_keeps_pefts_bits_also_behind_one_in_bfloat16() -> None:
    plain, fast = adapted(), adapted()
    assert fast_lora.switch_on(Accelerator(cpu=True), fast, "no") == 0
    number = sum(hasattr(module, "lora_A") for module in fast.modules())
    assert fast_lora.switch_on(Accelerator(cpu=True), fast, "bf16") == number
    assert fast_lora.switch_on(Accelerator(cpu=True), fast, "bf16") == number
    assert fast_lora.switch_on(Accelerator(cpu=True), fast, "no") == 0
    theirs, ours = outcome(plain, False), outcome(fast, False)
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())
