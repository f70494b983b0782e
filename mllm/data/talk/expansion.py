"""Placeholders to slots: each image's one token becomes as many as the encoder and connector make of it.

Enters: the tokens or labels of a conversation, where its placeholders stand, how wide each becomes. Leaves: the same
with the placeholders widened, or an error that says which sample has other placeholders than images, or nothing left
to learn behind a cut.
"""

from __future__ import annotations

from mllm.types import IGNORE_INDEX, IMAGE_TOKEN, Sample


class TooLong(ValueError):
    """Nothing is left to learn of a sample that was cut."""

    kind = "length"


def find_placeholders(sample: Sample, input_ids: list[int], image_token_id: int) -> list[int]:
    """Where the placeholders stand: as many as images, as marked and as tokenised.

    Raises:
        ValueError: their numbers differ.
    """
    marks = sum(message.num_images for message in sample.messages)
    places = [place for place, token in enumerate(input_ids) if token == image_token_id]
    if not marks == len(places) == len(sample.images):
        raise ValueError(
            f"{sample.where or sample.id}: {len(places)} {IMAGE_TOKEN} placeholders in the prompt, {marks} marks "
            f"in the messages, {len(sample.images)} images must be equal (does the text itself say {IMAGE_TOKEN}?)"
        )
    return places


def expand(values: list[int], places: list[int], slots: list[int]) -> list[int]:
    """Repeat each value that stands at a placeholder as often as its image has slots."""
    expanded, start = list[int](), 0
    for place, number in zip(places, slots, strict=True):
        expanded += values[start:place]
        expanded += values[place : place + 1] * number
        start = place + 1
    return expanded + values[start:]


def check_cut(sample: Sample, length: int, labels: list[int], max_length: int) -> None:
    """Something must be left to learn.

    Raises:
        TooLong: nothing is.
    """
    if any(label != IGNORE_INDEX for label in labels[1:]):
        return
    where = sample.where or sample.id
    if len(labels) < max_length:
        raise TooLong(
            f"{where}: {length} tokens do not fit a row of {max_length}, cutting them there would cut an image, "
            f"and in front of it is nothing to learn: raise data.seq_length or use a connector with fewer visual "
            f"tokens"
        )
    raise TooLong(f"{where}: {length} tokens cut to {max_length} leave nothing to learn: raise data.seq_length")
