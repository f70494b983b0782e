"""Tokens to words while they come.

Enters: a tokenizer and token ids, one by one. Leaves: pieces of text whose join is the text of them all. A piece is
held back while its last character is not whole: a letter of many bytes takes several tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

CUT = "\N{REPLACEMENT CHARACTER}"
"""What decoders print for bytes that are no whole character."""
BEHIND = 8
"""Tokens that are decoded again in front of each new one: what a piece looks like hangs on its neighbours (the first
word of a SentencePiece text loses its blank)."""


def pieces(tokenizer: Any, tokens: Iterable[int]) -> Iterator[str]:
    """The text of the tokens, without special ones."""
    held: list[int] = []
    told = ""
    for token in tokens:
        held.append(token)
        text = decode(tokenizer, held)
        if text.endswith(CUT):
            continue
        if len(text) > len(told):
            yield text[len(told) :]
        if len(held) > 2 * BEHIND:
            held = held[-BEHIND:]
            text = decode(tokenizer, held)
        told = text
    if len(rest := decode(tokenizer, held)) > len(told):
        yield rest[len(told) :]


def decode(tokenizer: Any, tokens: list[int]) -> str:
    return str(tokenizer.decode(tokens, skip_special_tokens=True))


def from_first_word(found: Iterable[str]) -> Iterator[str]:
    """The same text without the blanks that many tokenizers put in front of its first word."""
    started = False
    for piece in found:
        shown = piece if started else piece.lstrip()
        started = started or bool(shown)
        if shown:
            yield shown
