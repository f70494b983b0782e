"""The likeliest token, again and again, with the keys and values of the conversation kept from turn to turn.

Enters: a `Prompt`. Leaves: token ids, one by one, without the one that ends the answer. Of a prompt that begins like
what is kept (the earlier turns, as a rule) only the rest is computed; a template that rewrites earlier turns, another
image or another conversation shorten what both share, and the answer is always the one without anything kept.

T tokens of a prompt, D width of the LLM.
"""

from __future__ import annotations

import inspect
from collections.abc import Hashable, Iterator
from typing import Any

import torch
from torch import Tensor

from mllm.decoding.cache import KeptCache
from mllm.decoding.prompt import Prompt, common
from mllm.models.multimodal import MultimodalLM


class Greedy:
    """Answers with an LLM of which every token leaves a key and a value a layer."""

    def __init__(self, model: MultimodalLM, stop_ids: list[int], device: torch.device) -> None:
        self.model, self.stop_ids, self.device = model, stop_ids, device
        self.cache = KeptCache()
        self.marks: list[Hashable] = []
        """What the cache holds; never more than it does, wherever an answer is interrupted."""
        self.prefilled = 0
        """Tokens of the last prompt that were not kept already."""
        self.takes = set(inspect.signature(model.llm.forward).parameters)

    def answer(self, prompt: Prompt, max_new_tokens: int) -> Iterator[int]:
        """Tokens up to the end mark, at most `max_new_tokens`."""
        token = self.prefill(prompt)
        mine = self.marks
        for place in range(max_new_tokens):
            if token in self.stop_ids:
                return
            yield token
            if self.marks is not mine:
                raise ValueError("this answer cannot go on: another one of the same assistant has begun")
            if place + 1 < max_new_tokens:
                token = self.step(token)

    def prefill(self, prompt: Prompt) -> int:
        """Compute what is new of the prompt; the first token of the answer."""
        kept = min(common(self.marks, prompt.marks), len(prompt) - 1)  # the last token's logits are always needed
        self.marks = self.marks[:kept]
        self.cache.keep(kept)
        self.prefilled = len(prompt) - kept
        with torch.no_grad():
            token = self.run(inputs_embeds=prompt.embeddings(self.model, kept, self.device))
        self.marks = list(prompt.marks)
        return token

    def step(self, token: int) -> int:
        """The token behind this one."""
        with torch.no_grad():
            following = self.run(input_ids=torch.tensor([[token]], device=self.device))
        self.marks.append(token)
        return following

    def run(self, **tokens: Tensor) -> int:
        """Through the LLM; logits of the last position alone."""
        (new,) = tokens.values()
        positions = torch.arange(len(self.marks), len(self.marks) + new.shape[1], device=self.device)[None]
        options: dict[str, Any] = {"position_ids": positions, "logits_to_keep": 1}
        options = {name: value for name, value in options.items() if name in self.takes}
        found = self.model.llm(**tokens, **options, past_key_values=self.cache, use_cache=True)
        return int(found.logits[0, -1].argmax())
