"""Where in a rendered conversation the assistant's words stand.

Enters: a tokenizer with any chat template, and messages. Leaves: the text that the template prints, and the spans of
characters in it that the assistant says, each with the end mark behind it.

How they are found: the template is rendered once more with a marker in place of each answer, and the two renderings
are laid side by side. That needs nothing of the template but that it prints an answer once and unchanged (or
stripped), so there is no code for any family of LLMs here. Nearly always even that second rendering is saved: what a
template prints around the turns hangs on the roles alone, so it is remembered by roles, and used wherever it and the
words of all turns make exactly the text.
"""

from __future__ import annotations

from itertools import count
from typing import TYPE_CHECKING

from mllm.data.talk.template import Known, Turn, apply_template, known, words
from mllm.types import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Span = tuple[int, int]
REMEMBERED = 1024
"""Sequences of roles whose frame is kept; real sets have a few dozen."""


def render_with_spans(tokenizer: PreTrainedTokenizerBase, messages: list[Message]) -> tuple[str, list[Span]]:
    """The conversation as the LLM reads it, and where in it the assistant's words and end marks stand, in
    characters."""
    turns = [(message.role, words(message)) for message in messages]
    text = apply_template(tokenizer, turns)
    facts = known(tokenizer)
    frame = usual_frame(tokenizer, facts, tuple(role for role, _ in turns))
    spans = usual_spans(facts, frame, turns, text) if frame else None
    return text, found_spans(tokenizer, facts, turns, text) if spans is None else spans


def usual_spans(facts: Known, frame: list[str], turns: list[Turn], text: str) -> list[Span] | None:
    """The spans, if the text is the frame that the template always prints around these roles, and the turns' own
    words."""
    spans, position, pieces = [], 0, [frame[0]]
    for (role, said), following in zip(turns, frame[1:], strict=True):
        start = position + len(pieces[-1])
        position = start + len(said)
        if role == "assistant":
            spans.append((start, position + end_mark_length(facts, following)))
        pieces += said, following
    return spans if text == "".join(pieces) else None


def usual_frame(tokenizer: PreTrainedTokenizerBase, facts: Known, roles: tuple[str, ...]) -> list[str]:
    """What the template prints before, between and behind the turns; nothing if it does not keep their order."""
    frames = facts.frames
    if roles not in frames:
        if len(frames) == REMEMBERED:
            frames.clear()
        markers = [f"mllmTurn{number}mllm" for number in range(len(roles))]
        text = apply_template(tokenizer, list(zip(roles, markers, strict=True)))
        frames[roles] = split_at(text, markers) or []
    return frames[roles]


def found_spans(tokenizer: PreTrainedTokenizerBase, facts: Known, turns: list[Turn], text: str) -> list[Span]:
    """The spans, from a rendering of the same turns with markers for answers.

    Raises:
        ValueError: the template prints an answer twice, not at all, or otherwise than it is.
    """
    frame = split_at_answers(tokenizer, turns)
    answers = [said for role, said in turns if role == "assistant"]
    spans, position = [], 0
    for answer, before, following in zip(answers, frame, frame[1:], strict=False):
        start = position + len(before)
        printed = next((form for form in forms(answer) if text.startswith(form + following, start)), None)
        if printed is None or not text.startswith(before, position):
            raise ValueError(
                f"the chat template of {tokenizer.name_or_path} changes the assistant's words {answer!r}: "
                f"it prints {text[start : start + 80]!r}. Set a template that prints them as they are"
            )
        position = start + len(printed)
        spans.append((start, position + end_mark_length(facts, following)))
    if text[position:] != frame[-1]:
        raise ValueError(f"the chat template of {tokenizer.name_or_path} prints an answer differently from a marker")
    return spans


def forms(answer: str) -> tuple[str, ...]:
    """What templates make of an answer: nothing, or it loses white space (all of it, or, Qwen3, the new lines)."""
    return answer, answer.strip(), answer.lstrip(), answer.rstrip(), answer.strip("\n"), answer.lstrip("\n")


def split_at_answers(tokenizer: PreTrainedTokenizerBase, turns: list[Turn]) -> list[str]:
    """What the template prints before, between and behind the answers: one piece more than there are answers."""
    said = "".join(said for _, said in turns)
    stem = next(stem for n in count() if (stem := f"mllm{n}Answer") not in said)
    number = count()
    marked = [(role, f"{stem}{next(number)}mllm" if role == "assistant" else said) for role, said in turns]
    text = apply_template(tokenizer, marked)
    markers = [said for role, said in marked if role == "assistant"]
    frame = split_at(text, markers)
    if frame is None:
        missing = any(marker not in text for marker in markers)
        raise ValueError(
            f"the chat template of {tokenizer.name_or_path} prints an assistant turn "
            f"{'not at all' if missing else 'twice'}: labels cannot be taken from it"
        )
    return frame


def split_at(text: str, markers: list[str]) -> list[str] | None:
    """The pieces around the markers, if each stands there once and in this order."""
    pieces = []
    for marker in markers:
        piece, found, text = text.partition(marker)
        if not found or marker in text:
            return None
        pieces.append(piece)
    return [*pieces, text]


def end_mark_length(facts: Known, following: str) -> int:
    """Characters of the end mark: the special token behind an answer, with the white space before it, or none."""
    found = facts.end_mark.match(following) if facts.end_mark else None
    return found.end() if found else 0
