"""A question about one of several pictures, which the other pictures would answer otherwise.

Enters: pictures of one shape each. Leaves: some of them in an order, which of them is asked about, and the question.
"""

from __future__ import annotations

import random
from collections.abc import Mapping

from shapes.questions import Question
from shapes.scenes import OUTLINES, Scene

QUESTIONS = {"colour": "What colour is the shape in image {}?", "shape": "What kind of shape is in image {}?"}
MOST_TOGETHER = len(OUTLINES)
"""More pictures could not all hold another shape."""


def opening(together: int) -> str:
    """What stands before the question: each picture behind its number."""
    return "".join(f"image {number}: <image>\n" for number in range(1, together + 1))


def ask_about(drawn: Mapping[str, Scene], together: int, rng: random.Random) -> tuple[list[str], int, Question]:
    """Paths of the pictures, the number from 1 of the one asked about, and the question.

    No two of the pictures would answer it alike: who looks at another one is always wrong.

    Raises:
        ValueError: the pictures do not differ enough for that.
    """
    attribute = rng.choice(sorted(QUESTIONS))
    answers = {getattr(scene[0], attribute) for scene in drawn.values()}
    if len(answers) < together:
        raise ValueError(
            f"{len(drawn)} pictures hold {len(answers)} different answers to the {attribute}, and {together} are to be "
            f"shown together: draw more pictures (--images, --held-out-images)"
        )
    asked = rng.randint(1, together)
    told: dict[str, str] = {}  # answer -> path
    while len(told) < together:
        path = rng.choice(list(drawn))
        told.setdefault(getattr(drawn[path][0], attribute), path)
    answer, path = list(told.items())[asked - 1]
    text = QUESTIONS[attribute].format(asked)
    return list(told.values()), asked, Question(attribute, attribute, text, answer, (drawn[path][0],))
