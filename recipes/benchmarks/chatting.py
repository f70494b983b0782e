"""`mllm chat` measured: a first and a second turn about one picture, with an assistant of a real size.

Enters: sizes. Leaves: tokens a second, time to the first token of each turn, how often the encoder ran and how many
tokens each turn computed; each way of decoding beside the others and beside transformers' own `generate`, which keeps
nothing. On a CPU the sizes are small and the seconds are those of this process.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import product
from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, SiglipImageProcessor

from benchmarks.drawn import CHATML, SPECIAL
from benchmarks.sizes import ENCODERS, draw_model
from mllm.data.processor import Processor
from mllm.decoding.recorded import RecordedGreedy
from mllm.generate import Assistant
from mllm.models.multimodal import MultimodalLM
from mllm.types import Mark, Message, Sample

ON_GPU = {"1.5B": "so400m-384", "7B": "so400m-384"}
ON_CPU = {"small": "small"}
"""LLM and encoder."""
TARGETS = {
    "1.5B": {"tokens_per_s": 500.0},
    "7B": {"tokens_per_s": 150.0, "first_token_ms": 60.0, "second_turn_ms": 15.0},
}
"""At least so many tokens, at most so many milliseconds, on an H200."""
WAYS = ("compiled", "recorded", "ordinary", "generate")
"""Those first that matter most: a run may be cut off."""
SLOW = ("ordinary", "generate")
"""Timed with a quarter of the tokens on a device, where they are beside the point."""
QUESTIONS = ("What is shown?", "And why?")
"""A token a letter: with the template about 35 and 30 tokens, as longer questions have with a tokenizer of words."""
PICTURE = (640, 480)


def sizes(only: list[str] | None) -> dict[str, str]:
    """Those named; all for this device where none is.

    Raises:
        ValueError: an unknown name.
    """
    known = {**ON_GPU, **ON_CPU}
    chosen = only or list(ON_GPU if torch.cuda.is_available() else ON_CPU)
    if unknown := [name for name in chosen if name not in known]:
        raise ValueError(f"no LLM called {', '.join(unknown)}: choose of {', '.join(known)}")
    return {name: known[name] for name in chosen}


def measure(sizes: dict[str, str], tokens: int, repeats: int, keep: Callable, tick: Callable) -> dict[str, Any]:
    """All sizes; `keep` is given what is known after each of them, `tick` is told what goes on."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found: dict[str, Any] = {"tokens": tokens, "repeats": repeats, "device": device.type}
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    found |= {llm: {"ways": {}} for llm in sizes}
    made: dict[str, tuple[MultimodalLM, Processor]] = {}
    for way, llm in product(WAYS if device.type == "cuda" else SLOW, sizes):
        tick(f"{llm}, {way}")
        shorter = device.type == "cuda" and way in SLOW
        try:
            made[llm] = made.get(llm) or make(llm, sizes[llm], device, dtype)
            told = talk(*made[llm], way, max(5, tokens // 4) if shorter else tokens, repeats)
        except Exception as error:  # out of memory, say: the rest goes on
            told = {"error": f"{type(error).__name__}: {error}"[:500]}
        found[llm]["ways"][way] = told
        found[llm] |= best(found[llm]["ways"])
        keep(found)
    for llm, (model, processor) in made.items():
        found[llm]["second_turn_vs_anew"] = paired(model, processor, repeats)
        keep(found)
    return found


def is_complete(found: dict[str, Any], sizes: dict[str, str]) -> bool:
    """Has every way of every size its figures?"""
    ways = WAYS if found["device"] == "cuda" else SLOW
    return all(
        "second_turn_vs_anew" in found.get(llm, {})
        and all("tokens_per_s" in found[llm]["ways"].get(way, {}) for way in ways)
        for llm in sizes
    )


def make(llm: str, encoder: str, device: torch.device, dtype: torch.dtype) -> tuple[MultimodalLM, Processor]:
    processor = make_processor(encoder)
    return draw_model(llm, encoder, device, dtype, image_token_id=processor.image_token_id).eval(), processor


def best(ways: dict[str, Any]) -> dict[str, float]:
    """The figures of the fastest of our own ways."""
    done = [way for name, way in ways.items() if "tokens_per_s" in way and name != "generate"]
    return max(done, key=lambda way: way["tokens_per_s"]) if done else {}


def talk(model: MultimodalLM, processor: Processor, way: str, tokens: int, repeats: int) -> dict[str, Any]:
    """Two turns about a picture, again and again with another picture; the first time is not counted."""
    assistant = Assistant(model, processor, "ordinary" if way == "generate" else way)  # type: ignore[arg-type]
    start = time.perf_counter()
    turns(assistant, way, picture(0), tokens)
    found: dict[str, Any] = {"prepared_s": time.perf_counter() - start}
    rounds = [turns(assistant, way, picture(seed + 1), tokens) for seed in range(repeats)]
    for name in rounds[0]:
        found[name] = statistics.median(each[name] for each in rounds)
    for name in ("refused", "failed"):
        if why := getattr(assistant.greedy, name, ""):
            found[name] = why
    if model.llm.device.type == "cuda":
        with suppress(RuntimeError):  # a machine without a profiler: the rates stand
            found["kernels"] = kernels(assistant)
        found["kind"] = getattr(assistant.greedy, "ways", [])[:1] if way == "compiled" else []
    return found


def kernels(assistant: Assistant) -> list[tuple[str, int, float]]:
    """Of a recorded token: name, number and microseconds of the kernels that take longest."""
    if not isinstance(assistant.greedy, RecordedGreedy) or 1 not in assistant.greedy.recordings:
        return []
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        assistant.greedy.recordings[1].replay()
        torch.cuda.synchronize()
    events = sorted(profile.key_averages(), key=lambda event: -event.self_device_time_total)
    return [(event.key[:80], event.count, event.self_device_time_total) for event in events[:16]]


def turns(assistant: Assistant, way: str, shown: Image.Image, tokens: int) -> dict[str, float]:
    """The figures of two turns."""
    sample = Sample("chat", [Message("user", [Mark.IMAGE, "\n", QUESTIONS[0]])], [shown])
    with counted(assistant.model.vision_encoder) as calls:
        first, each, words = asked(assistant, way, sample, tokens)
        prefilled = assistant.greedy.prefilled if assistant.greedy else 0
        first_calls = len(calls)
        sample.messages += [Message("assistant", [words]), Message("user", [QUESTIONS[1]])]
        second, *_ = asked(assistant, way, sample, min(tokens, 4))
    again = assistant.greedy.prefilled if assistant.greedy else 0
    return {
        "tokens_per_s": 1 / each,
        "first_token_ms": 1e3 * first,
        "second_turn_ms": 1e3 * second,
        "encoder_calls_first_turn": first_calls,
        "encoder_calls_second_turn": len(calls) - first_calls,
        **({} if way == "generate" else {"prefilled_first_turn": prefilled, "prefilled_second_turn": again}),
    }


def asked(assistant: Assistant, way: str, sample: Sample, tokens: int) -> tuple[float, float, str]:
    """Seconds to the first token, seconds for each of the others, the answer's words."""
    heard, start = Heard(), time.perf_counter()
    if way == "generate":
        generate(assistant, sample, tokens, heard)
    else:
        for token in assistant.tokens(sample, tokens):
            heard.add(token)
    assert len(heard.tokens) == tokens, f"{len(heard.tokens)} tokens of {tokens}: a random model ended its answer"
    moments = heard.moments
    return moments[0] - start, (moments[-1] - moments[0]) / (tokens - 1), assistant.decode(heard.tokens)


@torch.inference_mode()
def generate(assistant: Assistant, sample: Sample, tokens: int, heard: Heard) -> None:
    """By transformers, as it is used: everything anew for each turn."""
    inputs = assistant.inputs([assistant.processor.prompt(sample)])
    assistant.model.llm.generate(**inputs, **assistant.options(tokens), streamer=heard)


class Heard:
    """Tokens and when they came; a streamer of transformers."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.moments: list[float] = []

    def add(self, token: int) -> None:
        self.moments.append(time.perf_counter())
        self.tokens.append(token)

    def put(self, value: torch.Tensor) -> None:
        """A token; at first the prompt's, of which there are none where it comes as embeddings."""
        for token in value.flatten().tolist():
            self.add(token)

    def end(self) -> None:
        """Nothing is held back."""


@contextmanager
def counted(module: torch.nn.Module) -> Iterator[list[int]]:
    """Images of each call."""
    calls: list[int] = []
    hook = module.register_forward_pre_hook(lambda _, inputs: calls.append(len(inputs[0])))
    yield calls
    hook.remove()


def paired(model: MultimodalLM, processor: Processor, repeats: int) -> dict[str, float]:
    """CPU seconds to the first token of a second turn, with nothing kept / with what the first turn left, pair by
    pair."""
    ratios = []
    for seed in range(repeats):
        kept, anew = (Assistant(model, processor, "ordinary") for _ in range(2))
        sample = Sample("chat", [Message("user", [Mark.IMAGE, "\n", QUESTIONS[0]])], [picture(100 + seed)])
        said = kept.decode(list(kept.tokens(sample, 4)))
        sample.messages += [Message("assistant", [said]), Message("user", [QUESTIONS[1]])]
        seconds = {}
        for assistant in (kept, anew) if seed % 2 else (anew, kept):
            start = time.process_time()
            next(iter(assistant.tokens(sample, 1)))
            seconds[assistant is kept] = time.process_time() - start
        ratios.append(seconds[False] / seconds[True])
    return {"median": statistics.median(ratios), "least": min(ratios), "greatest": max(ratios)}


def picture(seed: int) -> Image.Image:
    """Noise, decoded."""
    noise = np.random.default_rng(seed).integers(0, 256, (PICTURE[1], PICTURE[0], 3), np.uint8)
    return Image.fromarray(noise)


def make_processor(encoder: str) -> Processor:
    """Bytes as tokens with ChatML, and the encoder's squares."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate([*SPECIAL, *alphabet])}, merges=[]))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token=SPECIAL[0], eos_token=SPECIAL[2])
    tokenizer.add_tokens([AddedToken(SPECIAL[1], special=True)], special_tokens=True)
    tokenizer.chat_template = CHATML
    side = ENCODERS[encoder][1]["image_size"]
    squares = SiglipImageProcessor(size={"height": side, "width": side})
    return Processor(tokenizer, squares, (side // ENCODERS[encoder][1]["patch_size"]) ** 2)
