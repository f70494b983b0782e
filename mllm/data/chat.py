"""Messages to tokens and labels through the LLM's own chat template, whatever that template is.

Enters: a tokenizer and messages whose images are single placeholders. Leaves: `input_ids` and `labels` [T] in which
exactly the assistant's words and the end mark behind them are supervised.

How the words are found: the template is rendered once more with a marker in place of each answer, and the two
renderings are laid side by side. That needs nothing of the template but that it prints an answer once and unchanged
(or stripped), so there is no code for any family of LLMs here.
"""

from __future__ import annotations

import re
import warnings
from itertools import count
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError

from mllm.types import IGNORE_INDEX, IMAGE_TOKEN, Mark, Message

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
        warnings.warn(
            f"{tokenizer.name_or_path} has no chat template: using mllm's default (USER: / ASSISTANT:)",
            stacklevel=2,
        )
        tokenizer.chat_template = DEFAULT_TEMPLATE


def render(tokenizer: PreTrainedTokenizerBase, messages: list[Message], prompt: bool = False) -> str:
    """The conversation as the LLM reads it; with `prompt`, up to where the assistant's next words begin."""
    return apply_template(tokenizer, [(message.role, words(message)) for message in messages], prompt)


def encode(tokenizer: PreTrainedTokenizerBase, messages: list[Message]) -> tuple[list[int], list[int]]:
    """`input_ids` and `labels` [T]: labels are the ids where the assistant speaks, `IGNORE_INDEX` elsewhere."""
    text, spans = render_with_spans(tokenizer, messages)
    tokens = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    added = tokenizer.added_tokens_decoder
    labels = []
    for token, (start, end) in zip(tokens["input_ids"], tokens["offset_mapping"], strict=True):
        first = min(start, end - 1)  # Llama-3 trims spaces off its offsets: a token of spaces alone is (end, end)
        spoken = any(first < stop and end > begin for begin, stop in spans)
        # a role's token that swallows the white space behind it (Phi-3) reaches into the answer, and is not of it
        frame = token in added and any(first < begin < end for begin, _ in spans)
        labels.append(token if spoken and not frame else IGNORE_INDEX)
    return tokens["input_ids"], labels


def encode_prompt(tokenizer: PreTrainedTokenizerBase, messages: list[Message]) -> list[int]:
    """`input_ids` [T] of a conversation that waits for the assistant's answer."""
    return tokenizer(render(tokenizer, messages, prompt=True), add_special_tokens=False)["input_ids"]


def render_with_spans(tokenizer: PreTrainedTokenizerBase, messages: list[Message]) -> tuple[str, list[tuple[int, int]]]:
    """The conversation as the LLM reads it, and where in it the assistant's words and end marks stand, in
    characters."""
    text = render(tokenizer, messages)
    answers = [words(message) for message in messages if message.role == "assistant"]
    frame = split_at_answers(tokenizer, messages)
    spans = []
    position = 0
    for i, answer in enumerate(answers):
        start = position + len(frame[i])
        printed = next((form for form in forms(answer) if text.startswith(form + frame[i + 1], start)), None)
        if printed is None or not text.startswith(frame[i], position):
            raise ValueError(
                f"the chat template of {tokenizer.name_or_path} changes the assistant's words {answer!r}: "
                f"it prints {text[start : start + 80]!r}. Set a template that prints them as they are"
            )
        position = start + len(printed)
        spans.append((start, position + end_mark_length(tokenizer, frame[i + 1])))
    if text[position:] != frame[-1]:
        raise ValueError(f"the chat template of {tokenizer.name_or_path} prints an answer differently from a marker")
    return text, spans


def forms(answer: str) -> tuple[str, ...]:
    """What templates make of an answer: nothing, or it loses white space (all of it, or, Qwen3, the new lines)."""
    return answer, answer.strip(), answer.lstrip(), answer.rstrip(), answer.strip("\n"), answer.lstrip("\n")


def split_at_answers(tokenizer: PreTrainedTokenizerBase, messages: list[Message]) -> list[str]:
    """What the template prints before, between and behind the answers: one piece more than there are answers."""
    turns: list[tuple[str, str]] = []
    markers: list[str] = []
    said = "".join(words(message) for message in messages)
    stem = next(stem for n in count() if (stem := f"mllm{n}Answer") not in said)
    for message in messages:
        if message.role == "assistant":
            markers.append(f"{stem}{len(markers)}mllm")
        turns.append((message.role, markers[-1] if message.role == "assistant" else words(message)))
    rest, frame = apply_template(tokenizer, turns), []
    for marker in markers:
        piece, found, rest = rest.partition(marker)
        if not found or marker in rest:
            raise ValueError(
                f"the chat template of {tokenizer.name_or_path} prints an assistant turn "
                f"{'not at all' if not found else 'twice'}: labels cannot be taken from it"
            )
        frame.append(piece)
    return [*frame, rest]


def end_mark_length(tokenizer: PreTrainedTokenizerBase, following: str) -> int:
    """Characters of the end mark: the special token behind an answer, with the white space before it, or none."""
    marks = sorted({str(t) for t in special_tokens(tokenizer)}, key=len, reverse=True)
    found = re.match(r"\s*(" + "|".join(map(re.escape, marks)) + ")", following) if marks else None
    return found.end() if found else 0


def end_mark_id(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The token that ends an answer in this template, which generation must stop at; None if it has no end mark."""
    ids, labels = encode(tokenizer, [Message("user", ["a"]), Message("assistant", ["b"])])
    last = [i for i, label in zip(ids, labels, strict=True) if label != IGNORE_INDEX][-1]
    return last if tokenizer.decode([last]) in special_tokens(tokenizer) else None


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Every token of the vocabulary that was added whole (ChatML's marks are not flagged special by every tokenizer),
    except runs of white space and the image's placeholder."""
    added = [token.content for token in tokenizer.added_tokens_decoder.values() if token.content.strip()]
    return [token for token in dict.fromkeys([*tokenizer.all_special_tokens, *added]) if token != IMAGE_TOKEN]


def words(message: Message) -> str:
    """The message as the template gets it: each image is one placeholder."""
    return "".join(IMAGE_TOKEN if part is Mark.IMAGE else str(part) for part in message.content)


def apply_template(tokenizer: PreTrainedTokenizerBase, turns: list[tuple[str, str]], prompt: bool = False) -> str:
    """Run the template. Thinking is off wherever a template has it: training answers do not think aloud."""
    conversation: list[dict[str, Any]] = [{"role": role, "content": content} for role, content in turns]
    try:
        return str(
            tokenizer.apply_chat_template(
                conversation, tokenize=False, add_generation_prompt=prompt, enable_thinking=False
            )
        )
    except TemplateError as error:
        roles = ", ".join(role for role, _ in turns)
        raise ValueError(f"the chat template of {tokenizer.name_or_path} refuses the turns {roles}: {error}") from error
