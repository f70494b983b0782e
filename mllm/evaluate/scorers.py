"""Whether an answer is right, and how sure a share of right answers is.

Enters: words, or counts. Leaves: a bool, or an interval. Pure functions: a score can be checked by hand.
"""

from __future__ import annotations

import math
import unicodedata

FINAL_PUNCTUATION = ".,;:!?。！？"
"""Signs that end a sentence and change no answer: `Yes.` is `yes`."""

Z_95 = 1.959963984540054
"""The 97.5 % point of the normal distribution: two sides of 2.5 % leave 95 %."""


def normalise(text: str) -> str:
    """The form in which two answers are compared.

    In this order: Unicode NFKC, case folded, each run of white space one space, none at the ends, final
    punctuation removed. A text of punctuation alone keeps it, so that `?` never equals the empty answer.
    Articles, number words and inner punctuation stay: `3.5` is not `35`, `a cat` is not `cat`.
    """
    words = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    return words.rstrip(FINAL_PUNCTUATION + " ") or words


def exact_match(prediction: str, answer: str) -> bool:
    """Whether both are the same text after `normalise`."""
    return normalise(prediction) == normalise(answer)


def wilson_interval(correct: int, number: int) -> tuple[float, float]:
    """The 95 % interval of a share, `correct` of `number` (Wilson, 1927, JASA 22:209-212).

    Unlike the plain normal interval it stays within [0, 1] and keeps a width when every answer is right.
    """
    if not 0 <= correct <= number or number == 0:
        raise ValueError(f"{correct} of {number} is no share: expected 0 <= correct <= number and number > 0")
    share, z2 = correct / number, Z_95**2
    centre = (share + z2 / (2 * number)) / (1 + z2 / number)
    half = Z_95 / (1 + z2 / number) * math.sqrt(share * (1 - share) / number + z2 / (4 * number**2))
    return max(0.0, centre - half), min(1.0, centre + half)
