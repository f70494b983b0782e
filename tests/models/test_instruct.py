"""A Q-Former that reads the user's words: they reach it from the sample to the model, and the answer never does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import make_model, make_processor, make_sample, picture
from mllm.data.collate import collate, stack_instructions
from mllm.data.packing import join
from mllm.data.processor import LONGEST_INSTRUCTION, Processor
from mllm.generate import Assistant
from mllm.models.connectors import QFormerConnector
from mllm.models.multimodal import MultimodalLM
from mllm.train.halving import split
from mllm.train.losses import NextToken, model_inputs
from mllm.types import Batch, Mark, Message, Sample

CPU, SHAPE = torch.device("cpu"), (3, 28, 28)
CONNECTOR = QFormerConnector(num_queries=4, hidden_size=16, num_layers=4, num_heads=2, instruct=True)


def processor() -> Processor:
    return make_processor(instruct=True)


def model(seed: int = 0) -> MultimodalLM:
    return make_model(connector=CONNECTOR, seed=seed)


def talk(*turns: tuple[str, list[Any]]) -> Sample:
    messages = [Message(role, content) for role, content in turns]
    images = [picture(number) for number in range(sum(message.num_images for message in messages))]
    return Sample("one", messages, images)


def batch(rows: list[list[Sample]]) -> Batch:
    shown = processor()
    return collate([join([shown(sample) for sample in row], SHAPE) for row in rows], SHAPE)


def loss(built: MultimodalLM, made: Batch) -> torch.Tensor:
    return NextToken(built)(**model_inputs(made, CPU))


def test_instruction_is_the_words_of_the_images_own_turn() -> None:
    sample = talk(
        ("system", ["be brief"]),
        ("user", ["what is ", Mark.IMAGE, " this?"]),
        ("assistant", ["red"]),
        ("user", [Mark.IMAGE, Mark.IMAGE, "\nand these?"]),
        ("assistant", ["see ", Mark.IMAGE]),
    )
    shown = processor()
    said = [shown.tokenizer.decode(tokens) for tokens in shown.instructions(sample)]
    assert said == ["what is  this?", "and these?", "and these?", ""]
    assert make_processor().instructions(sample) == []


def test_long_instruction_keeps_its_last_words() -> None:
    sample = talk(("user", [Mark.IMAGE, "a b " * 200 + "which one?"]), ("assistant", ["a"]))
    (tokens,) = processor().instructions(sample)
    assert len(tokens) == LONGEST_INSTRUCTION
    assert processor().tokenizer.decode(tokens).endswith("which one?")


def test_batch_has_a_row_for_each_image_in_order_and_minus_one_behind_the_last_word() -> None:
    rows = [[make_sample(1), make_sample(2, num_images=0)], [make_sample(3, num_images=2)]]
    made, shown = batch(rows), processor()
    wanted = [tokens for row in rows for sample in row for tokens in shown.instructions(sample)]
    found = made["instruction_ids"]
    assert found is not None
    assert [row[row >= 0].tolist() for row in found] == wanted
    assert len(found) == made["num_images"] == 3
    assert collate([join([make_processor()(make_sample(1))], SHAPE)], SHAPE)["instruction_ids"] is None


def test_question_changes_the_visual_tokens_and_the_answer_does_not() -> None:
    built = model().eval()
    there, other, answered = (
        batch([[talk(("user", [Mark.IMAGE, question]), ("assistant", [answer]))]])
        for question, answer in (("what colour?", "red"), ("how many?", "red"), ("what colour?", "blue"))
    )
    with torch.no_grad():
        seen = [built.visual_tokens(made["pixel_values"], made["instruction_ids"]) for made in (there, other, answered)]
    assert not torch.allclose(seen[0], seen[1], atol=1e-4)
    assert torch.equal(seen[0], seen[2])


def test_packed_loss_and_gradient_equal_separate_ones() -> None:
    built = model().train()
    samples = [
        make_sample(1),
        make_sample(2, num_images=0),
        make_sample(3, num_images=2),
        make_sample(4, extra="long " * 9),
    ]

    def both(batches: list[Batch]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        built.zero_grad()
        summed = torch.stack([loss(built, made) for made in batches]).sum()
        summed.backward()
        return summed.detach(), {n: p.grad.clone() for n, p in built.connector.named_parameters() if p.grad is not None}

    packed, packed_gradients = both([batch([samples])])
    separate, separate_gradients = both([batch([[sample]]) for sample in samples])
    torch.testing.assert_close(packed, separate, rtol=1e-6, atol=1e-4)
    torch.testing.assert_close(packed_gradients, separate_gradients, rtol=1e-4, atol=2e-5)
    assert packed_gradients.keys() == dict(built.connector.named_parameters()).keys()


def test_text_only_batch_gives_every_connector_weight_a_gradient_of_zero() -> None:
    built = model().train()
    loss(built, batch([[make_sample(1, num_images=0)]])).backward()
    assert all(p.grad is not None and not p.grad.any() for p in built.connector.parameters())


def test_halved_micro_batch_keeps_the_words_of_its_own_images() -> None:
    built, whole = (
        model().eval(),
        batch([[make_sample(1)], [make_sample(2, num_images=0)], [make_sample(3, num_images=2)]]),
    )
    with torch.no_grad():
        parts = sum(loss(built, part) for part in split(whole, 1))
        torch.testing.assert_close(loss(built, whole), parts, rtol=1e-6, atol=1e-4)


def test_chat_sees_what_training_saw() -> None:
    assistant = Assistant(model(), processor())
    question = talk(("user", [Mark.IMAGE, "what colour is it?"]))
    prompt = assistant.processor.prompt(question)
    made = batch([[talk(("user", [Mark.IMAGE, "what colour is it?"]), ("assistant", ["red"]))]])
    with torch.no_grad():
        asked = assistant.inputs([prompt])["inputs_embeds"][0]
        visual = assistant.model.visual_tokens(made["pixel_values"], made["instruction_ids"])
        trained = assistant.model.embed(made["input_ids"], visual, 1)[0]
    torch.testing.assert_close(asked, trained[: len(asked)], rtol=0, atol=1e-6)
    assert stack_instructions(prompt.instructions) is not None


def test_saved_processor_still_hands_over_the_words(tmp_path: Path) -> None:
    processor().save(tmp_path)
    assert Processor.load(tmp_path).instruct


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_other_precision_is_finite(dtype: torch.dtype) -> None:
    built = CONNECTOR.build(24, 32, 4).to(dtype)
    out = built(torch.randn(2, 4, 24).to(dtype), torch.randn(2, 3, 32).to(dtype), torch.ones(2, 3).bool())
    assert out.dtype == dtype
    assert torch.isfinite(out).all()
