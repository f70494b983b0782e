"""Three parts as one model: hidden states, logits, what an image may change and what a text-only batch trains."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, CohereConfig, Gemma2Config, GraniteConfig

from conftest import ENDS, make_llm, make_model, make_processor, make_sample, picture
from mllm.data.collate import collate
from mllm.data.packing import join
from mllm.models.connectors import QFormerConnector
from mllm.models.multimodal import MultimodalLM
from mllm.train.losses import NextToken, model_inputs
from mllm.types import Batch, Mark, Message, Sample

QFORMER = QFormerConnector(num_queries=4, hidden_size=16, num_layers=2, num_heads=2)
CPU, SHAPE = torch.device("cpu"), (3, 28, 28)
SIZES = {
    "vocab_size": 384,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    **ENDS,
}
OTHERS = {
    "gemma2": Gemma2Config(**SIZES, head_dim=8, final_logit_softcapping=0.05),
    "cohere": CohereConfig(**SIZES, logit_scale=0.25),
    "granite": GraniteConfig(**SIZES, logits_scaling=8.0, embedding_multiplier=12.0),
}


def batch(samples: list[Sample]) -> Batch:
    processor = make_processor()
    return collate([join([processor(sample) for sample in samples], SHAPE)], SHAPE)


def hidden(model: MultimodalLM, samples: list[Sample]) -> torch.Tensor:
    inputs: Any = model_inputs(batch(samples), CPU)
    del inputs["labels"]
    with torch.no_grad():
        return model(**inputs)[0]


def about(image: Any) -> Sample:
    asked = Message("user", ["some words before ", Mark.IMAGE, " what is it?"])
    return Sample("one", [asked, Message("assistant", ["red"])], [image])


def test_image_changes_hidden_states_from_its_place_on_and_nothing_before() -> None:
    model, sample = make_model().eval(), about(picture(1))
    start = batch([sample])["input_ids"][0].tolist().index(model.image_token_id)
    one, other = hidden(model, [sample]), hidden(model, [about(picture(2))])
    assert start > 3
    assert torch.equal(one[:start], other[:start])
    real = len(make_processor()(sample).input_ids)
    assert ((one - other)[start:real].abs().amax(-1) > 0).all()


def test_two_images_keep_their_order() -> None:
    model = make_model().eval()
    messages = [Message("user", [Mark.IMAGE, Mark.IMAGE, "?"]), Message("assistant", ["a"])]
    there, back = (Sample("s", messages, [picture(i), picture(j)]) for i, j in ((1, 2), (2, 1)))
    assert not torch.allclose(hidden(model, [there]), hidden(model, [back]))


def test_visual_tokens_stand_in_the_slots_and_words_stay_words() -> None:
    model, packed = make_model().eval(), batch([make_sample(1), make_sample(2, num_images=2)])
    visual = model.visual_tokens(packed["pixel_values"])
    embeddings = model.embed(packed["input_ids"], visual, packed["num_images"])
    slots = packed["input_ids"] == model.image_token_id
    assert torch.equal(embeddings[slots], visual.flatten(0, 1))
    words = model.llm.get_input_embeddings()(packed["input_ids"][~slots])
    assert torch.equal(embeddings[~slots], words)


def test_image_token_may_lie_outside_the_vocabulary() -> None:
    model = make_model(vocab_size=make_processor().image_token_id).eval()
    assert torch.isfinite(hidden(model, [make_sample(1)])).all()


@pytest.mark.parametrize("connector", [None, QFORMER], ids=["mlp", "qformer"])
def test_text_only_batch_gives_every_connector_weight_a_gradient_of_zero(connector: Any) -> None:
    model = make_model(connector=connector).train()
    model.vision_encoder.requires_grad_(False)
    NextToken(model)(**model_inputs(batch([make_sample(1, num_images=0)]), CPU)).backward()
    for name, parameter in model.connector.named_parameters():
        assert parameter.grad is not None, name
        assert not parameter.grad.any(), name


def test_text_only_hidden_states_are_the_llms_own() -> None:
    model, text = make_model().eval(), batch([make_sample(1, num_images=0)])
    length = len(make_processor()(make_sample(1, num_images=0)).input_ids)
    ids = text["input_ids"][:, :length]
    with torch.no_grad():
        own = model.llm.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state[0]
    torch.testing.assert_close(hidden(model, [make_sample(1, num_images=0)])[:length], own, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dropped", [1, 2])
def test_other_number_of_images_than_placeholders_is_refused_with_both_numbers(dropped: int) -> None:
    inputs = model_inputs(batch([make_sample(1, num_images=3)]), CPU)
    inputs["pixel_values"] = inputs["pixel_values"][dropped:]
    inputs["num_images"] = 3 - dropped
    with pytest.raises(ValueError, match=rf"12 placeholder slots .* {4 * (3 - dropped)} visual tokens"):
        NextToken(make_model())(**inputs)


def test_placeholders_without_any_image_are_refused() -> None:
    inputs = model_inputs(batch([make_sample(1)]), CPU)
    with pytest.raises(ValueError, match=r"4 placeholder slots .* 0 visual tokens"):
        NextToken(make_model())(**{**inputs, "num_images": 0})


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", *OTHERS])
def test_logits_equal_those_of_the_llms_own_forward(family: str) -> None:
    model = make_model().eval()
    torch.manual_seed(0)
    if family in OTHERS:
        model.llm = AutoModelForCausalLM.from_config(OTHERS[family], attn_implementation="eager").eval()
    else:
        model.llm = make_llm(family).eval()
    ids = torch.randint(6, 300, (2, 9))
    with torch.no_grad():
        own = model.llm(input_ids=ids, use_cache=False).logits
        states = model(ids, torch.arange(9).expand(2, -1), torch.zeros(1, *SHAPE), 0)
        torch.testing.assert_close(model.logits(states), own, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", list(OTHERS))
def test_head_of_the_family_is_not_that_of_llama(family: str) -> None:
    """Guards the test above: without the scale or cap the logits would differ."""
    llm = AutoModelForCausalLM.from_config(OTHERS[family], attn_implementation="eager").eval()
    ids = torch.randint(6, 300, (1, 5))
    with torch.no_grad():
        plain = llm.get_output_embeddings()(llm.get_decoder()(input_ids=ids).last_hidden_state)
        assert not torch.allclose(plain, llm(input_ids=ids).logits, atol=1e-4)


def test_bfloat16_llm_with_float32_connector_gives_finite_loss_and_gradient() -> None:
    model = make_model().requires_grad_(False)
    model.vision_encoder.bfloat16()
    model.llm.bfloat16()
    model.connector.requires_grad_(True)
    loss = NextToken(model)(**model_inputs(batch([make_sample(1)]), CPU))
    loss.backward()
    assert loss.dtype == torch.float32
    assert all(torch.isfinite(p.grad).all() and p.grad.dtype == torch.float32 for p in model.connector.parameters())
