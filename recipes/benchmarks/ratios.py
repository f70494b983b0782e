"""On a CPU: what a step of ours costs beside other ways, in CPU time of this process.

Enters: how many pairs. Leaves: ratios, each the median over neighbours in time. `fit` runs as it is; after each of its
steps every other way takes one of its own, so that all meet the same moods of the machine. Sizes are small, and so is
what a loop may cost beside them.

Ways: `ours`, the product's whole loop with its loader in this process; `bare`, the same model and batches in a few
lines; `all logits`, bare with the loss that libraries compute; `padded`, the naive way with its loader.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from benchmarks import naive, product
from benchmarks.clock import speed
from benchmarks.configurations import Configuration, attention, default, stage_1
from benchmarks.drawn_training import Drawing, DrawnIndex, draw
from benchmarks.sizes import ENCODERS, LLMS, draw_model
from benchmarks.stopwatch import Enough
from mllm.models.multimodal import MultimodalLM
from mllm.models.packed.choice import Attention
from mllm.train.trainable import choose_trainable

LLM, ENCODER, SHRINK = "small", "small", 9
"""The head is a quarter of this LLM, as of Qwen2.5-0.5B; 64 visual tokens and texts a ninth of their length, so that
attention weighs no more than in a large one."""
TOKENS, BATCH = 2048, 16
"""Of a packed micro-batch; samples of a padded one."""
WARM_UP = 2
CPU = torch.device("cpu")
Seconds = dict[str, list[float]]


def measure(pairs: int, say: Callable[[str], None] = lambda words: None) -> dict[str, Any]:
    """CPU time a real token of one way divided by that of another: the median pair, the least and the greatest."""
    torch.set_num_threads(1)
    seconds = take_turns(pairs, say)
    bare = seconds["bare"]
    return {
        "ours_over_bare": speed(bare, seconds["ours"]),
        "padded_over_packed": speed(bare, seconds["padded"]),
        "all_logits_over_supervised": speed(bare, seconds["all logits"]),
        "pairs": pairs,
        "seconds_per_token": seconds,
    }


def take_turns(pairs: int, say: Callable[[str], None]) -> Seconds:
    """CPU seconds a real token of each way, pair by pair."""
    row, plain = small(default("1.5B")), small(stage_1("1.5B")[0])
    index, processor = draw(drawing())
    length, number = product.layout(index.length, TOKENS)
    with product.scratch() as folder:
        train = product.settings(row, folder, number, bf16=False)
        data = product.data_settings(length, workers=0)
        plan = product.plan_of(index, data, train)
        tokens = [plan.counts(step)["tokens"] for step in range(pairs + WARM_UP)]
        models = [small_model(row), small_model(row), small_model(plain)]
        held = product.held(models[1], index, processor, plan, data, train, CPU)
        bare, all_logits = product.NextToken(models[1]), product.AllLogits(models[1])
        others = {
            "bare": cycled(product.bare(models[1], held, train, bare), tokens[: len(held)]),
            "all logits": cycled(product.bare(models[1], held, train, all_logits), tokens[: len(held)]),
            "padded": padded(models[2], index, processor),
        }
        turns = Turns(others, tokens, pairs, say)
        hook = register_optimizer_step_post_hook(lambda *_: turns())
        try:
            product.loop(models[0], index, processor, data, train, CPU, turns)
        except Enough:
            return {name: each[WARM_UP:] for name, each in turns.seconds.items()}
        finally:
            hook.remove()
    raise AssertionError("the run ended before all turns were taken")


class Turns:
    """Called behind each step of the loop that is measured: its time, then a step of each other way."""

    def __init__(
        self, others: dict[str, Iterator[float]], tokens: list[float], pairs: int, say: Callable[[str], None]
    ) -> None:
        self.others, self.tokens, self.pairs, self.say = others, tokens, pairs, say
        self.seconds: Seconds = {name: [] for name in ("ours", *others)}
        self.is_inside = False
        self.began = time.process_time()

    def __call__(self) -> None:
        if self.is_inside:  # another way's own step
            return
        done = len(self.seconds["ours"])
        self.seconds["ours"].append((time.process_time() - self.began) / self.tokens[done])
        self.is_inside = True
        names = list(self.others)
        for name in names[:: -1 if done % 2 else 1]:
            began = time.process_time()
            tokens = next(self.others[name])
            self.seconds[name].append((time.process_time() - began) / tokens)
        self.is_inside = False
        self.say(f"pair {done + 1 - WARM_UP} of {self.pairs}")
        if done + 1 == self.pairs + WARM_UP:
            raise Enough
        self.began = time.process_time()

    def look_at(self, objective: nn.Module) -> None:
        """Nothing of it is looked at."""

    def loads(self, batches: Iterator[Any]) -> Iterator[Any]:
        """As they are."""
        return batches


def cycled(steps: Iterator[None], tokens: list[float]) -> Iterator[float]:
    """The real tokens of each step."""
    while True:
        for number in tokens:
            next(steps)
            yield number


def padded(model: MultimodalLM, index: DrawnIndex, processor: Any) -> Iterator[float]:
    """The naive way; the real tokens of each step."""
    assert model.vision_encoder.normalisation is not None
    samples = naive.Samples(index, processor, model.vision_encoder.normalisation)  # type: ignore[arg-type]
    steps = naive.loop(naive.NaiveLlava(model), naive.read(samples, BATCH, workers=0), CPU, 1e-3, bf16=False)
    for numbers in naive.order(len(index), BATCH):
        next(steps)
        yield float(index.length[numbers].sum())


def small(row: Configuration) -> Configuration:
    """That for a CPU: ours with the attention that computes each sample by itself."""
    own: Attention = "sdpa" if row.way == "naive" else "by_sample"
    return replace(row, llm=LLM, encoder=ENCODER, kind="instruct", attention=own, compiled=False)


def drawing() -> Drawing:
    """Conversations about pictures of the encoder that is used."""
    encoder = ENCODERS[ENCODER][1]
    patches = (encoder["image_size"] // encoder["patch_size"]) ** 2
    return Drawing("instruct", patches, encoder["image_size"], LLMS[LLM]["vocab_size"], samples=1024, shrink=SHRINK)


def small_model(row: Configuration) -> MultimodalLM:
    """With the parts trained that the row names."""
    model = draw_model(LLM, ENCODER, CPU, torch.float32, attention(row))
    choose_trainable(model, row.rates, row.adapter)
    return model
