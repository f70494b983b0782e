"""Messages to tokens and labels through the LLM's own chat template, whatever that template is.

Enters: a tokenizer and messages whose images are single placeholders. Leaves: `input_ids` and `labels` [T] in which
exactly the assistant's words and the end mark behind them are supervised.
"""

from __future__ import annotations

import re
import warnings
from bisect import bisect_left, bisect_right
from operator import itemgetter
from typing import TYPE_CHECKING

from mllm.data.talk.answers import render_with_spans
from mllm.data.talk.markers import without
from mllm.data.talk.template import apply_template, known, on_the_same_day, special_tokens, words
from mllm.types import IGNORE_INDEX, Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DEFAULT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message.role == 'user' %}USER: {{ message.content }}"
    "{% elif message.role == 'assistant' %}ASSISTANT: {{ message.content }}{{ eos_token }}"
    "{% else %}{{ message.content }}{% endif %}{{ '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
"""For an LLM that brings no template of its own: Vicuna's words, one turn a line, eos behind each answer."""


def ensure_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """Give a tokenizer without a chat template the default one, and say so; refuse one that cannot tell where its
    tokens stand in the text."""
    if not tokenizer.is_fast:
        raise ValueError(
            f"{tokenizer.name_or_path} has a slow tokenizer ({type(tokenizer).__name__}) without character offsets: "
            f"labels cannot be taken from it. Convert it to a tokenizer.json"
        )
    if not tokenizer.chat_template:
        if tokenizer.eos_token is None:
            raise ValueError(
                f"{tokenizer.name_or_path} has neither a chat template nor an eos token: an answer would never end. "
                f"Set one of them in its tokenizer_config.json"
            )
        warnings.warn(
            f"{tokenizer.name_or_path} has no chat template: using mllm's default (USER: / ASSISTANT:)",
            stacklevel=2,
        )
        tokenizer.chat_template = DEFAULT_TEMPLATE
    if isinstance(tokenizer.chat_template, str):
        tokenizer.chat_template = on_the_same_day(tokenizer.chat_template)


def render(tokenizer: PreTrainedTokenizerBase, messages: list[Message], prompt: bool = False) -> str:
    """The conversation as the LLM reads it; with `prompt`, up to where the assistant's next words begin."""
    return apply_template(tokenizer, [(message.role, words(message)) for message in messages], prompt)


def encode(
    tokenizer: PreTrainedTokenizerBase, messages: list[Message], unsaid: re.Pattern[str] | None = None
) -> tuple[list[int], list[int]]:
    """`input_ids` and `labels` [T]: labels are the ids where the assistant speaks, `IGNORE_INDEX` elsewhere, and where
    its words match `unsaid`."""
    text, spans = render_with_spans(tokenizer, messages)
    spans = without(spans, text, unsaid) if unsaid else spans
    tokens = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, return_attention_mask=False)
    input_ids, offsets, added = tokens["input_ids"], tokens["offset_mapping"], known(tokenizer).added
    labels = [IGNORE_INDEX] * len(input_ids)
    for begin, stop in spans:  # tokens follow the text, so those of a span stand side by side
        at = bisect_right(offsets, begin, key=itemgetter(1))
        behind = bisect_left(offsets, stop, at, key=first_character)
        labels[at:behind] = input_ids[at:behind]
        while at < len(offsets) and first_character(offsets[at]) < begin:
            # a role's token that swallows the white space behind it (Phi-3) reaches into the answer, and is not of it
            if input_ids[at] in added:
                labels[at] = IGNORE_INDEX
            at += 1
    return input_ids, labels


def first_character(offsets: tuple[int, int]) -> int:
    """Of a token: Llama-3 trims spaces off its offsets, so that a token of spaces alone is (end, end)."""
    start, end = offsets
    return min(start, end - 1)


def encode_prompt(tokenizer: PreTrainedTokenizerBase, messages: list[Message]) -> list[int]:
    """`input_ids` [T] of a conversation that waits for the assistant's answer."""
    return tokenizer(render(tokenizer, messages, prompt=True), add_special_tokens=False)["input_ids"]


def end_mark_id(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The token that ends an answer in this template, which generation must stop at; None if it has no end mark."""
    ids, labels = encode(tokenizer, [Message("user", ["a"]), Message("assistant", ["b"])])
    last = [i for i, label in zip(ids, labels, strict=True) if label != IGNORE_INDEX][-1]
    return last if tokenizer.decode([last]) in special_tokens(tokenizer) else None


def template_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """The whole tokens that the template prints around the words, with their ids; the LLM must know them."""
    ids, _ = encode(tokenizer, [Message("user", ["a"]), Message("assistant", ["b"])])
    added = known(tokenizer).added
    return {str(tokenizer.convert_ids_to_tokens(token)): token for token in dict.fromkeys(ids) if token in added}
