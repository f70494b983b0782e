"""What can be said of a text in any language without understanding it.

Enters: the words that the assistant says. Leaves: a few numbers, each with one definition. The kinds of rule are those
of Gopher's and RefinedWeb's filters (lengths, repetition, symbols, addresses) that hold for a caption as for a page.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable
from itertools import groupby

HAN = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
"""Han and kana are written without spaces: each sign counts as a word."""
WORD = re.compile(rf"[{HAN}]|[^\s{HAN}]+")
ADDRESS = re.compile(r"(?:https?://|www\.)\S+", re.IGNORECASE)
PUNCTUATION = ".,;:!?\"'()[]{}<>…。，、；：！？「」『』“”‘’«»*_#-"
NGRAM = 3
"""Words of a phrase that may not come twice; pairs come twice in any longer text."""


def measure_text(text: str) -> dict[str, float]:
    """All numbers of a text; shares are of the signs that are no white space."""
    words, signs = words_of(text), [sign for sign in text if not sign.isspace()]
    return {
        "characters": len(text.strip()),
        "words": len(words),
        "repetition": round(repetition(words), 4),
        "run": max((sum(1 for _ in same) for _, same in groupby(signs)), default=0),
        "non_letters": share((not is_letter(sign) for sign in signs), len(signs)),
        "urls": share(map(bool, "".join(ADDRESS.findall(text))), len(signs)),
        "capitals": capitals(signs),
    }


def words_of(text: str) -> list[str]:
    """What stands between white space and has a letter or a digit in it; Han and kana one by one."""
    return [word for word in WORD.findall(text) if any(sign.isalnum() for sign in word)]


def repetition(words: list[str]) -> float:
    """Share of the three-word phrases that stood earlier in the text; case and punctuation at the ends do not count."""
    plain = [word.strip(PUNCTUATION).casefold() for word in words]
    phrases = [tuple(plain[at : at + NGRAM]) for at in range(len(plain) - NGRAM + 1)]
    return 1 - len(set(phrases)) / len(phrases) if phrases else 0.0


def is_letter(sign: str) -> bool:
    """Letters, and the marks without which many scripts cannot write them."""
    return sign.isalpha() or unicodedata.category(sign).startswith("M")


def capitals(signs: list[str]) -> float:
    """Share of capitals among the letters that have two cases; 0 in scripts that have one."""
    cased = [sign for sign in signs if sign.isupper() or sign.islower()]
    return share((sign.isupper() for sign in cased), len(cased))


def share(hits: Iterable[bool], of: int) -> float:
    return round(sum(hits) / of, 4) if of else 0.0
