"""The tokenizer's chat template and its special tokens, as the rest of the data side asks for them.

Enters: a tokenizer, turns. Leaves: the text that its template prints, the tokens that it never splits.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from datetime import date
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from jinja2 import TemplateError

from mllm.types import IMAGE_TOKEN, Mark, Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Turn = tuple[str, str]
"""Role and words."""

TODAY = re.compile(r"""strftime_now\(\s*(['"])(.*?)\1\s*\)""")
SAME_DAY = date(2024, 7, 26)
"""The day that Llama 3.1's own template falls back to."""


def on_the_same_day(template: str) -> str:
    """The template with a fixed day in place of today (Llama 3.1, SmolLM3): else the lengths in a stored index, and
    the losses of a run that is resumed, would change at midnight."""
    return TODAY.sub(lambda call: repr(SAME_DAY.strftime(call[2])), template)


def words(message: Message) -> str:
    """The message as the template gets it: each image is one placeholder."""
    return "".join(IMAGE_TOKEN if part is Mark.IMAGE else str(part) for part in message.content)


def apply_template(tokenizer: PreTrainedTokenizerBase, turns: list[Turn], prompt: bool = False) -> str:
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


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Every token of the vocabulary that was added whole (ChatML's marks are not flagged special by every tokenizer),
    except runs of white space and the image's placeholder."""
    added = [token.content for token in tokenizer.added_tokens_decoder.values() if token.content.strip()]
    return [token for token in dict.fromkeys([*tokenizer.all_special_tokens, *added]) if token != IMAGE_TOKEN]


@dataclass(frozen=True)
class Known:
    """What was found out about a tokenizer and its template."""

    added: frozenset[int]
    """Ids of all tokens that were added to the vocabulary."""
    end_mark: re.Pattern[str] | None
    """White space and one of `special_tokens`; None where there are none."""
    frames: dict[tuple[str, ...], list[str]] = field(default_factory=dict)
    """By the roles of a conversation, what the template prints around the turns."""


_known: WeakKeyDictionary[PreTrainedTokenizerBase, tuple[tuple[Any, ...], Known]] = WeakKeyDictionary()


def known(tokenizer: PreTrainedTokenizerBase) -> Known:
    """Found out once, since to ask a tokenizer for hundreds of tokens takes as long as to encode an answer; and again
    when tokens were added or the template was changed."""
    state = (tokenizer.chat_template, len(tokenizer), *tokenizer.all_special_tokens)
    found = _known.get(tokenizer)
    if found is None or found[0] != state:
        marks = sorted(special_tokens(tokenizer), key=len, reverse=True)
        end_mark = re.compile(r"\s*(" + "|".join(map(re.escape, marks)) + ")") if marks else None
        found = _known[tokenizer] = state, Known(frozenset(tokenizer.added_tokens_decoder), end_mark)
    return found[1]
