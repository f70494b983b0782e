"""On a CPU: what LoRA adds to a step in half precision, by our short way and by peft's own modules.

Enters: how many pairs. Leaves: counts and a ratio of CPU time. The small model of `ratios` in bfloat16 computes packed
rows of conversations forward and backward, with an LLM without adapters, with those of peft, and with the same ones by
`mllm/train/tuning/fast_lora.py`. A GPU waits for its memory in what adapters add, so that bytes say most about it; on a
CPU products weigh far more, and its time says little.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from benchmarks.clock import interleaved, speed
from benchmarks.configurations import Configuration, attention, stage_1, stage_2
from benchmarks.counted import packed_step, some_samples
from benchmarks.counters import Traffic, traffic
from benchmarks.ratios import CPU, ENCODER, LLM, small
from benchmarks.sizes import draw_model
from mllm.train.trainable import choose_trainable, set_mode
from mllm.train.tuning import fast_lora

Step = Callable[[], Any]


def ways() -> dict[str, Step]:
    """A step of each, forward and backward."""
    adapted, plain = stage_2("1.5B")[0], stage_1("1.5B")[1]
    return {"without": step_of(plain, False), "peft": step_of(adapted, False), "fast": step_of(adapted, True)}


def step_of(row: Configuration, is_fast: bool) -> Step:
    own = draw_model(LLM, ENCODER, CPU, torch.bfloat16, attention(small(row)))
    choose_trainable(own, row.rates, row.adapter)
    set_mode(own)
    assert not is_fast or fast_lora.convert(own) > 0
    step = packed_step(own, some_samples(1))

    def call() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            step(True)

    return call


def counts() -> dict[str, float]:
    """What the adapters add the fast way / what they add by peft: operations, and bytes that these read and write."""
    torch.set_num_threads(1)
    found: dict[str, Traffic] = {}
    for name, step in ways().items():
        step()  # gradients are made
        found[name] = traffic(step)

    def added(name: str) -> float:
        fast, peft, without = (getattr(found[way], name) for way in ("fast", "peft", "without"))
        return float((fast - without) / (peft - without))

    return {"lora_operations": added("operations"), "lora_bytes": added("bytes")}


def ratio(pairs: int, say: Callable[[str], None] = lambda words: None) -> dict[str, float]:
    """CPU time of a step by peft's modules / by the fast path."""
    torch.set_num_threads(1)
    say("adapters by two ways")

    def once(step: Step) -> int:
        step()
        return 1

    seconds = interleaved({name: partial(once, step) for name, step in ways().items() if name != "without"}, pairs)
    return speed(seconds["fast"], seconds["peft"])
