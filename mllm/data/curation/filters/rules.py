"""The rules of a filter, all off until they are set, and what they say of one sample's scores.

Enters: thresholds. Leaves: for scores the reasons to leave the sample out, none for a sample that is kept. A rule
speaks about samples that have its score: a limit on images leaves text alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mllm.schema import Schema

MOST_BITS = 16
"""Of 64: unrelated pictures differ in 20 to 44."""


@dataclass
class Rules(Schema):
    """What a sample must be to be kept."""

    min_characters: int | None = None
    """Fewest characters of what the assistant says, in all its turns."""
    max_characters: int | None = None
    """Most characters of it."""
    min_words: int | None = None
    """Fewest words of it; Han and kana count one by one."""
    max_words: int | None = None
    """Most words of it."""
    max_repetition: float | None = None
    """Largest share of its three-word phrases that may have stood earlier in it."""
    max_run: int | None = None
    """Longest run of one character, as of dashes."""
    max_non_letters: float | None = None
    """Largest share of digits and signs among its characters."""
    max_urls: float | None = None
    """Largest share of its characters that may belong to web addresses."""
    max_capitals: float | None = None
    """Largest share of capitals among its letters."""
    min_side: int | None = None
    """Shortest side that an image may have, in pixels."""
    max_side: int | None = None
    """Longest side that an image may have, in pixels."""
    max_aspect: float | None = None
    """Largest ratio of an image's sides."""
    min_clip: float | None = None
    """Least cosine of an image and what is said of it, by the model of --clip; LAION took 0.28 to 0.3."""
    min_score: float | None = None
    """Least score in the file of --scores; a sample without one is left out."""
    duplicates: int | None = None
    """Leave out copies of an earlier image: pictures that differ in at most so many of 64 bits, and little in colour. 6
    finds resized and recompressed copies; 2 is for drawings that differ little."""
    leak_distance: int = 6
    """The same for images that are also in a folder of --benchmark."""

    def __post_init__(self) -> None:
        for name in ("duplicates", "leak_distance"):
            bits = getattr(self, name)
            if bits is not None and not 0 <= bits <= MOST_BITS:
                raise ValueError(f"--{name.replace('_', '-')} is {bits}: give 0 to {MOST_BITS} bits")

    def limits(self) -> list[Limit]:
        """The thresholds that are set."""
        found = [(limit, getattr(self, limit[0])) for limit in LIMITS]
        return [Limit(rule, score, bound, least) for (rule, score, least), bound in found if bound is not None]


LIMITS = (
    ("min_characters", "characters", True),
    ("max_characters", "characters", False),
    ("min_words", "words", True),
    ("max_words", "words", False),
    ("max_repetition", "repetition", False),
    ("max_run", "run", False),
    ("max_non_letters", "non_letters", False),
    ("max_urls", "urls", False),
    ("max_capitals", "capitals", False),
    ("min_side", "min_side", True),
    ("max_side", "max_side", False),
    ("max_aspect", "aspect", False),
    ("min_clip", "clip", True),
    ("min_score", "score", True),
)
"""Rule, the score it is about, whether it is the least or the most."""
SIZES = ("min_side", "max_side", "max_aspect")


@dataclass(frozen=True)
class Limit:
    """One threshold."""

    rule: str
    score: str
    bound: float
    least: bool

    def broken(self, scores: Mapping[str, Any]) -> bool:
        value = scores.get(self.score)
        return value is not None and (value < self.bound if self.least else value > self.bound)


@dataclass(frozen=True)
class Reason:
    """Why a sample is left out."""

    rule: str
    told: str


def judge(scores: Mapping[str, Any], limits: list[Limit]) -> list[Reason]:
    """The limits that a sample breaks, in the order of the rules."""
    return [
        Reason(
            limit.rule, f"{limit.score} {scores[limit.score]:g}, {'least' if limit.least else 'most'} {limit.bound:g}"
        )
        for limit in limits
        if limit.broken(scores)
    ]
