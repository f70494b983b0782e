"""Tokens of a chat template that the LLM has never learned are found before the first step."""

from __future__ import annotations

import pytest
from rich.text import Text

from conftest import make_llm, make_model, make_processor
from mllm.data import chat
from mllm.models.vocabulary import untrained_tokens
from mllm.train.preflight import template_line
from mllm.train.trainable import LearningRates, Lora, choose_trainable


def line(reserved: list[str], rates: LearningRates, lora: Lora | None = None) -> str:
    """What preflight prints of an LLM whose rows for these tokens are nearly zero."""
    model, processor = make_model(), make_processor()
    for token in reserved:
        model.llm.get_input_embeddings().weight.data[processor.tokenizer.convert_tokens_to_ids(token)] *= 1e-9
    choose_trainable(model, rates, lora)
    said = template_line(model, processor)
    assert isinstance(said, Text)
    return said.plain


def test_template_tokens_are_those_it_prints_and_no_others() -> None:
    tokenizer = make_processor().tokenizer
    assert list(chat.template_tokens(tokenizer)) == ["<|user|>", "<|end|>", "<|assistant|>"]


def test_template_in_plain_words_has_only_its_end_mark() -> None:
    with pytest.warns(UserWarning, match="no chat template"):
        tokenizer = make_processor(chat_template=None).tokenizer
    assert list(chat.template_tokens(tokenizer)) == ["<s>", "<|end|>"]


def test_trained_rows_are_said_to_be_so() -> None:
    assert line([], LearningRates(connector=1e-3)).endswith("<|assistant|>, all with rows that the LLM has learned")


@pytest.mark.parametrize("lora", [Lora(rank=2), None], ids=["lora", "align"])
def test_reserved_rows_that_nothing_trains_are_warned_of_by_name(lora: Lora | None) -> None:
    said = line(["<|user|>", "<|system|>"], LearningRates(connector=1e-3, llm=1e-3 if lora else None), lora)
    assert "look untrained: <|user|>; nothing here trains them" in said


def test_reserved_rows_of_an_llm_that_trains_whole_are_said_to_be_trained() -> None:
    assert "<|user|>; they are trained here" in line(["<|user|>"], LearningRates(llm=1e-3))


def test_template_token_without_a_row_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"prints <new>, .* 384 rows"):
        untrained_tokens(make_llm(), {"<s>": 1, "<new>": 384})


def test_table_without_values_is_not_judged() -> None:
    assert untrained_tokens(make_llm().to("meta"), {"<s>": 1}) is None
    model = make_model()
    model.llm.to("meta")
    assert template_line(model, make_processor()).plain.endswith("rows not read yet")
