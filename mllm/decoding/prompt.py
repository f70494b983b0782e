"""A conversation as tokens, each of which says what it is: its id, or which part of which image.

Enters: a `Sample` that waits for an answer. Leaves: a `Prompt`: marks to compare with those of the turn before, and
the embeddings [1, T, D] of its last tokens.

T tokens, S slots of an image, D width of the LLM.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mllm.data.talk.expansion import expand
from mllm.decoding.pictures import Pictures
from mllm.models.multimodal import MultimodalLM
from mllm.types import Sample


@dataclass(frozen=True)
class Prompt:
    """Tokens and what stands in the slots of their images."""

    input_ids: list[int]
    marks: list[Hashable]
    """A token's id; of a slot, its image and its number there. Equal marks in front mean equal keys and values."""
    visual_tokens: list[Tensor]
    """[S, D] of each image."""

    def __len__(self) -> int:
        return len(self.input_ids)

    def embeddings(self, model: MultimodalLM, start: int, device: torch.device) -> Tensor:
        """[1, T - start, D]: of the tokens behind the first `start`."""
        input_ids = torch.tensor([self.input_ids[start:]], device=device)
        placeholders = self.input_ids[start:].count(model.image_token_id)
        if not placeholders:
            return model.llm.get_input_embeddings()(input_ids)
        visual = torch.cat(self.visual_tokens)[-placeholders:]  # those in front of `start` are kept already
        return model.embed(input_ids, visual[None], 1)


def read(sample: Sample, pictures: Pictures, device: torch.device) -> Prompt:
    """Tokenise, look at the images that are new.

    Raises:
        ValueError: placeholders and images differ, an image cannot be read.
    """
    processor = pictures.processor
    sample = processor.framed(sample)
    unexpanded, places = processor.asked(sample)
    shown = pictures(sample, device)
    input_ids = expand(unexpanded, places, [len(picture.tokens) for picture in shown])
    slots = ((picture.number, slot) for picture in shown for slot in range(len(picture.tokens)))
    marks: list[Hashable] = [next(slots) if token == processor.image_token_id else token for token in input_ids]
    return Prompt(input_ids, marks, [picture.tokens for picture in shown])


def common(before: Sequence[Hashable], now: Sequence[Hashable]) -> int:
    """Length of the beginning that both share."""
    both = zip(before, now, strict=False)
    return next((place for place, (mine, theirs) in enumerate(both) if mine != theirs), min(len(before), len(now)))
