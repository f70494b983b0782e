"""Lengths in words, for whoever has not chosen a tokenizer yet.

Enters: a `Sample`. Leaves: what a `Processor` would tell the index, with a word in the place of each token and nothing
in the place of an image. In front of the words stands one entry for the beginning, since the first of all is never
learned.
"""

from __future__ import annotations

from mllm.data.curation.filters.text import words_of
from mllm.data.processor import Encoded, Processor
from mllm.types import IGNORE_INDEX, Sample

BEGINNING = 1
"""Entries that are no words."""


class WordCounter(Processor):
    """Counts where a processor would tokenise."""

    image_token_id = -1

    def __init__(self) -> None:
        """Without a tokenizer, an image processor or a number of visual tokens."""

    def encoded(self, sample: Sample, max_length: int | None = None) -> Encoded:
        """One entry a word, labelled where the assistant says it."""
        labels = [IGNORE_INDEX] * BEGINNING
        for message in sample.messages:
            label = 0 if message.role == "assistant" else IGNORE_INDEX
            labels += [label] * len(words_of(message.text))
        return Encoded([0] * len(labels), labels, len(sample.images), len(sample.images))
