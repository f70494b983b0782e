"""What is remembered of a template gives what looking anew would give, and is forgotten when the template changes."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from families import CHATML, FAMILIES, LLAMA3
from mllm.data import chat
from mllm.data.talk import answers
from mllm.data.talk.template import known, words
from mllm.types import IGNORE_INDEX, Message

TOKENIZERS = {name: family.tokenizer() for name, family in FAMILIES.items()}
TOKENIZERS["none"].chat_template = chat.DEFAULT_TEMPLATE
WORDS = st.lists(st.sampled_from(["red", " ", "\n", "猫", "assistant", "<|im_end|>", "a large square", "e\u0301"])).map(
    "".join
)
TALKS = st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=4)


def messages_of(talk: list[tuple[str, str]]) -> list[Message]:
    return [Message(role, [said]) for turn in talk for role, said in zip(("user", "assistant"), turn, strict=True)]


@given(TALKS, st.sampled_from(sorted(FAMILIES)))
@settings(deadline=None)
def test_remembered_frames_give_the_spans_of_a_second_rendering(talk: list[tuple[str, str]], name: str) -> None:
    tokenizer, messages = TOKENIZERS[name], messages_of(talk)
    turns = [(message.role, words(message)) for message in messages]
    text = chat.render(tokenizer, messages)
    facts = known(tokenizer)
    try:
        wanted = answers.found_spans(tokenizer, facts, turns, text)
    except ValueError:
        return
    assert answers.render_with_spans(tokenizer, messages) == (text, wanted)


@given(TALKS, st.sampled_from(sorted(FAMILIES)))
@settings(deadline=None)
def test_labels_are_the_tokens_that_reach_into_a_span(talk: list[tuple[str, str]], name: str) -> None:
    tokenizer, messages = TOKENIZERS[name], messages_of(talk)
    try:
        text, spans = answers.render_with_spans(tokenizer, messages)
    except ValueError:
        return
    found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    labels = []
    for token, (start, end) in zip(found["input_ids"], found["offset_mapping"], strict=True):
        first = min(start, end - 1)
        spoken = any(first < stop and end > begin for begin, stop in spans)
        frame = token in tokenizer.added_tokens_decoder and any(first < begin < end for begin, _ in spans)
        labels.append(token if spoken and not frame else IGNORE_INDEX)
    assert chat.encode(tokenizer, messages) == (found["input_ids"], labels)


def test_a_template_is_rendered_once_where_its_frame_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer, rendered = FAMILIES["qwen2"].tokenizer(), []
    apply = tokenizer.apply_chat_template
    monkeypatch.setattr(tokenizer, "apply_chat_template", lambda *a, **k: rendered.append(1) or apply(*a, **k))
    for number in range(5):
        chat.encode(tokenizer, messages_of([(f"what is {number}?", "red"), ("and now?", "a large square")]))
    assert len(rendered) == 5 + 1


def test_another_template_and_later_tokens_are_noticed() -> None:
    tokenizer, talk = FAMILIES["qwen2"].tokenizer(), messages_of([("what?", "red")])
    assert tokenizer.decode(spoken(chat.encode(tokenizer, talk))) == "red<|im_end|>"
    tokenizer.chat_template = CHATML.replace("'<|im_end|>'", "'<|stop|>'")
    assert tokenizer.decode(spoken(chat.encode(tokenizer, talk))) == "red"
    tokenizer.add_tokens(["<|stop|>"], special_tokens=True)
    assert tokenizer.decode(spoken(chat.encode(tokenizer, talk))) == "red<|stop|>"


def spoken(encoded: tuple[list[int], list[int]]) -> list[int]:
    return [label for label in encoded[1] if label != IGNORE_INDEX]


def test_roles_that_are_kept_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = FAMILIES["llama3"].tokenizer()
    tokenizer.chat_template = LLAMA3
    monkeypatch.setattr(answers, "REMEMBERED", 3)
    for turns in range(1, 8):
        chat.encode(tokenizer, messages_of([("what?", "red")] * turns))
    assert len(known(tokenizer).frames) <= 3
