"""What stands around each image in the prompt, where a model shall be able to speak of "image 2".

Enters: the messages of a conversation. Leaves: the same with words around each image, numbered from 1 over the whole
conversation: "(image 1: <Image>", the image, "</Image>)", the form of Mantis (arXiv 2405.01483). These are plain
words: no token is added. A packed row holds several samples, each of which counts for itself.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from itertools import count
from typing import Literal

from mllm.types import IMAGE_TOKEN, Mark, Message

ImageMarkers = Literal["none", "numbered"]
NUMBERED = re.compile(rf"\(image \d+: <Image>{re.escape(IMAGE_TOKEN)}</Image>\)")
"""What the text holds for an image; none of it is learned where it stands in the assistant's own turn."""


def marked(messages: Iterable[Message]) -> list[Message]:
    """The messages with words around each image."""
    numbers = count(1)
    return [
        Message(message.role, [part for given in message.content for part in around(given, numbers)])
        for message in messages
    ]


def around(part: str | Mark, numbers: Iterator[int]) -> list[str | Mark]:
    if part is not Mark.IMAGE:
        return [part]
    return [f"(image {next(numbers)}: <Image>", part, "</Image>)"]


def without(spans: Iterable[tuple[int, int]], text: str, pattern: re.Pattern[str]) -> list[tuple[int, int]]:
    """What is left of spans of a text where the pattern matches are taken out of them."""
    left = []
    for begin, stop in spans:
        for match in pattern.finditer(text, begin, stop):
            left.append((begin, match.start()))
            begin = match.end()
        left.append((begin, stop))
    return [span for span in left if span[0] < span[1]]
