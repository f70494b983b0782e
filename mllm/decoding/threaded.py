"""An answer of transformers' own loop, heard while it is made.

Enters: a model with `generate`, what it is asked, its tokenizer. Leaves: words as they come. The loop runs in a thread
of its own, which ends with whoever listens.
"""

from __future__ import annotations

from collections.abc import Iterator
from threading import Event, Thread
from typing import Any

import torch
from torch import Tensor


class Over(Event):
    """A stopping criterion of transformers: yes for every row of [B, S], once it is set."""

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        return torch.full((len(input_ids),), self.is_set(), device=input_ids.device)


def words_of(model: Any, tokenizer: Any, asked: dict[str, Any], skip_prompt: bool = False) -> Iterator[str]:
    """What the model says to one conversation. `asked` are the inputs and options of `generate`; `skip_prompt` where
    the inputs are token ids, which the loop tells again."""
    from transformers import TextIteratorStreamer

    streamer = TextIteratorStreamer(tokenizer, skip_prompt=skip_prompt, skip_special_tokens=True)
    failed: list[Exception] = []
    over = Over()

    @torch.inference_mode()
    def generate() -> None:
        try:
            model.generate(**asked, streamer=streamer, stopping_criteria=[over])
        except Exception as error:  # told to the caller below: here nobody would hear it, and he would wait
            failed.append(error)
            streamer.end()

    work = Thread(target=generate, daemon=True)
    work.start()
    try:
        yield from streamer
    finally:  # also where nobody listens any more: the next answer must not find this one at work
        over.set()
        work.join()
    if failed:
        raise failed[0]
