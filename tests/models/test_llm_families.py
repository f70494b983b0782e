"""The LLMs that the README names, a tiny random one of each: nothing in the house knows their names.

Sliding windows are six tokens wide here, rows have a hundred: what a window cuts off is cut off in every test below.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from conftest import (
    LLM_CONFIGS,
    WINDOW,
    make_clip,
    make_image_processor,
    make_llm,
    make_model,
    make_processor,
    make_sample,
)
from mllm.data.collate import collate
from mllm.data.packing import join
from mllm.generate import Assistant
from mllm.models.attention import check_isolation
from mllm.models.build import ModelConfig, build_model
from mllm.models.multimodal import MultimodalLM
from mllm.train.losses import NextToken, model_inputs
from mllm.train.stage_folder import load_stage, save_stage
from mllm.train.trainable import LearningRates, Lora, choose_trainable
from mllm.types import Example, Sample

CPU, SHAPE = torch.device("cpu"), (3, 28, 28)
ATTENTION = {"gemma2": "eager"}
"""Gemma 2 caps its attention scores, which sdpa cannot."""
WINDOWED = ["qwen2_sliding", "mistral", "gemma2", "gemma3", "phi3", "smollm3"]
each = pytest.mark.parametrize("family", LLM_CONFIGS)


def model_of(family: str, **llm: Any) -> MultimodalLM:
    return make_model(family, ATTENTION.get(family, "sdpa"), **llm)


def sharp(model: MultimodalLM) -> MultimodalLM:
    """Random weights of tiny LLMs answer nearly alike: larger ones make every token count."""
    torch.manual_seed(7)
    for parameter in model.llm.parameters():
        if parameter.ndim == 2:
            parameter.data.normal_(0, 0.25)
    return model.eval()


def examples() -> list[Example]:
    """An image, none, two images, many turns: all longer than a window."""
    extra = "and a few more words"
    samples = [make_sample(1), make_sample(2, 0, turns=2), make_sample(3, 2), make_sample(4, turns=3, extra=extra)]
    return [make_processor()(sample) for sample in samples]


def loss_and_gradients(model: MultimodalLM, rows: list[list[Example]]) -> tuple[Tensor, dict[str, Tensor]]:
    """Summed over rows, each of them a batch."""
    objective = NextToken(model.train())
    objective.zero_grad()
    batches = [collate([join(row, SHAPE)], SHAPE) for row in rows]
    loss = torch.stack([objective(**model_inputs(batch, CPU)) for batch in batches]).sum()
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@each
def test_packed_loss_and_gradient_equal_separate_ones(family: str) -> None:
    model, samples = model_of(family), examples()
    assert min(len(sample.input_ids) for sample in samples) > 2 * WINDOW
    packed_loss, packed = loss_and_gradients(model, [samples])
    separate_loss, separate = loss_and_gradients(model, [[sample] for sample in samples])
    torch.testing.assert_close(packed_loss, separate_loss, rtol=1e-6, atol=0)
    torch.testing.assert_close(packed, separate, rtol=1e-4, atol=3e-5)


@each
def test_preflight_finds_that_the_family_keeps_samples_apart(family: str) -> None:
    check_isolation(model_of(family).llm)


@pytest.mark.parametrize("family", WINDOWED)
def test_window_is_at_work_in_these_tests(family: str) -> None:
    """Guards the tests above and below: without its window the LLM would say something else."""
    ids = torch.arange(6, 46)[None]
    with torch.no_grad():
        narrow, whole = (
            make_llm(family, ATTENTION.get(family, "sdpa"), **more)(input_ids=ids, use_cache=False).logits
            for more in ({}, {"sliding_window": 400})
        )
    torch.testing.assert_close(narrow[:, :WINDOW], whole[:, :WINDOW], rtol=0, atol=1e-5)
    assert not torch.allclose(narrow[:, -1], whole[:, -1], rtol=0, atol=1e-5)


@each
def test_words_reach_the_llm_as_its_own_forward_embeds_them(family: str) -> None:
    """Gemma multiplies embeddings by the root of its width; the head may have a scale or a cap."""
    model, ids = model_of(family).eval(), torch.arange(6, 46).reshape(2, 20)
    with torch.no_grad():
        own = model.llm(input_ids=ids, use_cache=False).logits
        states = model(ids, torch.arange(20).expand(2, -1), torch.zeros(1, *SHAPE), 0)
        torch.testing.assert_close(model.logits(states), own, rtol=0, atol=1e-5)


@each
def test_visual_tokens_enter_the_first_layer_as_the_connector_made_them(family: str) -> None:
    """None of these scales what it is handed as embeddings: a connector's output means the same in all of them."""
    model = model_of(family).eval()
    batch = collate([join(examples()[:1], SHAPE)], SHAPE)
    seen: list[Tensor] = []
    model.llm.get_decoder().layers[0].register_forward_hook(lambda _m, inputs, _o: seen.append(inputs[0]))
    with torch.no_grad():
        inputs: Any = model_inputs(batch, CPU)
        del inputs["labels"]
        model(**inputs)
        made = model.visual_tokens(inputs["pixel_values"])
    assert torch.equal(seen[0][batch["input_ids"] == model.image_token_id], made.flatten(0, 1))


@each
def test_lora_reaches_every_linear_layer_but_the_head(family: str) -> None:
    model = model_of(family)
    head = model.llm.get_output_embeddings()
    wanted = {name for name, m in model.llm.named_modules() if isinstance(m, nn.Linear) and m is not head}
    choose_trainable(model, LearningRates(connector=1e-3, llm=1e-3), Lora(rank=2, alpha=4))
    trained = [name for name, p in model.llm.named_parameters() if p.requires_grad]
    found = {name.removeprefix("base_model.model.").partition(".lora_")[0] for name in trained}
    assert found == wanted
    assert len(trained) == 2 * len(wanted) > 8


def asked(seed: int, num_images: int, extra: str = "") -> Sample:
    sample = make_sample(seed, num_images=num_images, extra=extra)
    return Sample(sample.id, sample.messages[:-1], sample.images)


@each
def test_prefill_with_images_then_a_cache_gives_the_logits_of_the_whole_forward(family: str) -> None:
    """Two questions of different length side by side, so that one of them is padded; windows are passed many times."""
    assistant = Assistant(sharp(model_of(family)), make_processor())
    prompts = [assistant.processor.prompt(sample) for sample in (asked(1, 2), asked(2, 0, "a longer question, " * 4))]
    options = {**assistant.options(9), "eos_token_id": None, "return_dict_in_generate": True, "output_logits": True}
    with torch.no_grad():
        made = assistant.model.llm.generate(**assistant.inputs(prompts), **options)
        for row, prompt in enumerate(prompts):
            ids = torch.tensor([prompt.input_ids + made.sequences[row].tolist()])
            pixels = prompt.pixel_values if len(prompt.pixel_values) else torch.zeros(1, *SHAPE)
            states = assistant.model(ids, torch.arange(ids.shape[1])[None], pixels, len(prompt.pixel_values))
            whole = assistant.model.logits(states[0, len(prompt.input_ids) - 1 : -1])
            cached = torch.stack([logits[row] for logits in made.logits])
            torch.testing.assert_close(cached, whole, rtol=0, atol=2e-4 * float(whole.abs().max()))


@each
@pytest.mark.parametrize("lora", [Lora(rank=2, alpha=4), None], ids=["lora", "whole"])
def test_saved_and_reloaded_stage_says_the_same(family: str, lora: Lora | None, tmp_path: Path) -> None:
    make_clip().save_pretrained(tmp_path / "encoder")
    make_image_processor().save_pretrained(tmp_path / "encoder")
    model_of(family).llm.save_pretrained(tmp_path / "llm")
    config = ModelConfig(str(tmp_path / "encoder"), str(tmp_path / "llm"), attention=ATTENTION.get(family, "sdpa"))
    processor, batch = make_processor(), collate([join(examples(), SHAPE)], SHAPE)
    trained, fresh = (build_model(config, processor.image_token_id) for _ in range(2))
    choose_trainable(trained, LearningRates(connector=1e-3, llm=1e-3), lora)
    torch.manual_seed(3)
    for parameter in trained.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn_like(parameter)
    save_stage(tmp_path, trained, processor, "")
    with torch.no_grad():
        before, untrained = (float(NextToken(m.eval())(**model_inputs(batch, CPU))) for m in (trained, fresh))
        load_stage(fresh, tmp_path)
        after = float(NextToken(fresh.eval())(**model_inputs(batch, CPU)))
    assert after == before != untrained
