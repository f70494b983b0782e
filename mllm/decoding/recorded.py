"""Greedy decoding on a CUDA device from recorded kernels: a token costs the reading of the weights, and little else.

Enters and leaves what `greedy` does. Started one by one from Python, the kernels of a token would take several times
as long as they run. Two CUDA graphs are recorded for a size of the buffers: one token, which feeds itself; and a chunk
of a prompt, for the few new tokens of a later turn. A long prompt is computed as ever.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from mllm.decoding.compiled import attention_for_one, compiled_layers, compiler
from mllm.decoding.fixed import FixedForward
from mllm.decoding.fused import FusedForward, fusable
from mllm.decoding.greedy import Greedy
from mllm.decoding.prompt import Prompt
from mllm.models.multimodal import MultimodalLM

CHUNK = 64
"""Tokens of a prompt that are computed at once: a short question. Up to so many the weights are what takes time."""
MOST_CHUNKS = 4
"""A longer rest of a prompt keeps the device busy by itself."""
HEADROOM = 512
"""Tokens of later turns that a buffer has room for: each new one takes new recordings."""


class Recording:
    """A `FixedForward` as a CUDA graph."""

    def __init__(self, forward: FixedForward, around: Any) -> None:
        self.forward, self.graph = forward, torch.cuda.CUDAGraph()
        behind = forward.cache.layers[0].length  # what a rehearsal writes must not count
        with torch.no_grad(), around:
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(3):
                    forward.positions.copy_(behind + torch.arange(forward.width))
                    forward()
            torch.cuda.current_stream().wait_stream(side)
            with torch.cuda.graph(self.graph):
                forward()

    def replay(self) -> None:
        self.graph.replay()

    def seconds(self, times: int = 8) -> float:
        """Of a replay."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(times):
            self.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1000 / times


class RecordedGreedy(Greedy):
    """The same answers, faster; where an LLM cannot be recorded it says so once, and is as slow as ever."""

    def __init__(self, model: MultimodalLM, stop_ids: list[int], device: torch.device, compiled: bool) -> None:
        super().__init__(model, stop_ids, device)
        self.compiled = compiler() if compiled else None
        self.recordings: dict[int, Recording] = {}
        self.capacity = 0
        self.ways = list(WAYS)
        """To try for a token; after the first recording, the quicker one alone."""
        self.failed: dict[str, str] = {}
        """Why one of them could not be had."""
        self.refused = ""
        """Why there can be no recordings."""
        self.ahead = False
        """The kernels of the next token were started before anyone asked for it."""
        self.told = torch.zeros(1, 1, dtype=torch.long, pin_memory=torch.cuda.is_available())
        self.copied = torch.cuda.Event()

    def answer(self, prompt: Prompt, max_new_tokens: int) -> Iterator[int]:
        self.ahead = False
        if (needed := len(prompt) + max_new_tokens + CHUNK) > self.cache.capacity:
            self.cache.reserve(needed + HEADROOM)
        return super().answer(prompt, max_new_tokens)

    def run(self, **tokens: Tensor) -> int:
        embeddings = tokens.get("inputs_embeds")
        if embeddings is None:
            return self.run_one(tokens["input_ids"])
        if not self.marks or embeddings.shape[1] > MOST_CHUNKS * CHUNK or not (chunk := self.recorded(CHUNK)):
            return super().run(**tokens)
        return self.run_chunks(embeddings, chunk)

    def run_chunks(self, embeddings: Tensor, chunk: Recording) -> int:
        """[1, T, D] in pieces, the last one padded; what the padding writes lies behind, and is written over."""
        forward, start = chunk.forward, len(self.marks)
        for piece in embeddings.split(CHUNK, dim=1):
            forward.embeddings[:, : piece.shape[1]] = piece
            forward.positions.copy_(torch.arange(start, start + CHUNK))
            forward.last.fill_(piece.shape[1] - 1)
            chunk.replay()
            self.cache.advance(piece.shape[1])
            start += piece.shape[1]
        return int(forward.token)

    def run_one(self, token: Tensor) -> int:
        """The successor; before it is known here the device already works on the one behind it."""
        one = self.recorded(1)
        if one is None:
            return super().run(input_ids=token)
        if not self.ahead:
            one.forward.token.copy_(token)
            one.forward.positions.fill_(len(self.marks))
            one.replay()
        self.told.copy_(one.forward.token, non_blocking=True)
        self.copied.record()
        self.cache.advance(1)
        self.ahead = len(self.marks) + 2 < self.capacity
        if self.ahead:
            one.replay()
        self.copied.synchronize()
        return int(self.told)

    def recorded(self, width: int) -> Recording | None:
        """The recording for the buffers as they are; None where there can be none."""
        if self.capacity != self.cache.capacity:
            torch.cuda.synchronize()  # what was started ahead
            self.recordings, self.capacity = {}, self.cache.capacity
        if width not in self.recordings and not self.refused:
            try:
                self.recordings[width] = self.record(width)
            except Exception as error:  # whatever this family does that no graph can hold
                self.refused = first_line(error)
                warnings.warn(f"this LLM cannot be recorded, its answers take longer ({self.refused})", stacklevel=2)
        return self.recordings.get(width)

    def record(self, width: int) -> Recording:
        llm, cache = self.model.llm, self.cache
        if width > 1 or not self.compiled:
            return Recording(FixedForward(llm, cache, width), nullcontext())
        found = {}
        for name in self.ways:
            try:
                if made := WAYS[name](self):
                    found[name] = made
            except Exception as error:  # a Triton too old for the device, a compiler that is missing
                self.failed[name] = first_line(error)
        if not found:
            return Recording(FixedForward(llm, cache, 1), nullcontext())
        quickest = min(found, key=lambda name: found[name].seconds())
        self.ways = [quickest]
        return found[quickest]

    def compiled_one(self) -> Recording:
        """The layers of transformers, compiled."""
        forward = FixedForward(self.model.llm, self.cache, 1, attention_for_one(self.model.llm))
        return Recording(forward, compiled_layers(self.model.llm, self.cache, self.compiled))

    def fused_one(self) -> Recording | None:
        """Kernels of our own, where they fit and are right."""
        if not fusable(self.model.llm):
            return None
        with torch.no_grad():
            forward = FusedForward(self.model.llm, self.cache)
            forward.positions.fill_(len(self.marks))
            forward.prove()
        return Recording(forward, nullcontext())


WAYS: dict[str, Callable[[RecordedGreedy], Recording | None]] = {
    "fused": RecordedGreedy.fused_one,
    "compiled": RecordedGreedy.compiled_one,
}
"""Kernels of one token: the quicker ones are kept."""


def first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
