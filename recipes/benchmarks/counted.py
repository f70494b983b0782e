"""On a CPU: what a step of ours asks for, beside the naive way and beside the arithmetic.

Enters: nothing. Leaves: a mapping of counts, each with what is asked of it, for the small model of `ratios` and its
conversations: packed rows and padded batches of the same samples, frozen and trained.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import naive, product
from benchmarks.configurations import stage_1
from benchmarks.counters import bytes_for_backward, flops, rows_of_words
from benchmarks.drawn_training import DrawnIndex, DrawnProcessor, draw
from benchmarks.ratios import BATCH, CPU, LLM, TOKENS, drawing, small, small_model
from benchmarks.sizes import LLMS
from mllm.data.loader import PlannedBatches, Share, batches
from mllm.data.plan import Plan
from mllm.models.multimodal import MultimodalLM
from mllm.models.packed.boundaries import boundaries
from mllm.train.forecasting.flops import Work, cost_of
from mllm.train.inputs import inputs_of
from mllm.train.losses import num_supervised
from mllm.types import Batch

ASKED = {
    "flops_over_arithmetic": ("a packed step / 4 N + 4 H at supervised rows + attention", "0.98 to 1.02"),
    "padded_over_packed_flops": ("padded / packed, operations a real token", "at least 1.7"),
    "frozen_over_trained_flops": ("LLM frozen / trained, operations with a weight", "0.662 to 0.672"),
    "frozen_over_trained_bytes": ("LLM frozen / trained, bytes kept for the backward pass", "at most 0.85"),
    "packed_over_padded_bytes": ("packed / padded, bytes kept a real token", "at most 0.80"),
    "logit_rows_over_supervised": ("rows of logits / supervised rows", "at most 1"),
    "fill": ("share of the rows that is tokens", "at least 0.995"),
    "waits": ("results that the host must read in a micro-batch", "0 of ours"),
    "lora_operations": ("operations that LoRA adds to a step, ours / peft's", "at most 0.70"),
    "lora_bytes": ("bytes that these read and write, ours / peft's", "at most 0.35"),
}
"""Of each count its words, and what is asked of it."""


READ = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "bincount", "unique")
"""Operations whose result, or its shape, the host must read, by the beginnings of their names."""


class Waits(TorchDispatchMode):
    """Counts what would make the host wait for a device."""

    number = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.number += function.overloadpacket.__name__.startswith(READ)
        return function(*args, **(kwargs or {}))


@dataclass
class Samples:
    """Some samples, packed and padded."""

    index: DrawnIndex
    processor: DrawnProcessor
    packed: list[Batch]
    numbers: list[int]
    """Of the samples in the packed batches."""
    fill: float

    @property
    def in_batches(self) -> list[list[int]]:
        """In whole batches of the naive way, in the order of the set."""
        numbers = sorted(self.numbers)
        return [numbers[start : start + BATCH] for start in range(0, len(numbers) - BATCH + 1, BATCH)]

    @property
    def tokens(self) -> int:
        return int(self.index.length[self.numbers].sum())

    @property
    def tokens_in_batches(self) -> int:
        return int(self.index.length[[number for batch in self.in_batches for number in batch]].sum())

    @property
    def work(self) -> Work:
        """Of the packed batches; attention computes all pairs of a sample, those of the future too."""
        length, own = self.index.length[self.numbers].astype(int), self.numbers
        supervised, images = (int(column[own].sum()) for column in (self.index.supervised, self.index.images))
        return Work(self.tokens, int((length**2).sum()), supervised, images)


def measure(steps: int = 3) -> dict[str, float]:
    """All counts, of the samples of so many steps."""
    torch.set_num_threads(1)
    samples, frozen, trained = some_samples(steps), model(), model()
    trained.llm.requires_grad_(True)
    plain = model(0)
    packed, padded = packed_step(frozen, samples), padded_step(plain, samples)
    share = samples.tokens / samples.tokens_in_batches
    arithmetic = cost_of(frozen).flops(samples.work)
    with Waits() as waits:
        packed(True)
    rows = rows_of_words(lambda: packed(True), LLMS[LLM]["vocab_size"], frozen)
    packed_flops = flops(lambda: packed(True))
    return {
        "flops_over_arithmetic": packed_flops / arithmetic,
        "padded_over_packed_flops": share * flops(lambda: padded(True)) / packed_flops,
        "frozen_over_trained_flops": llm_flops(frozen, samples) / llm_flops(trained, samples),
        "frozen_over_trained_bytes": kept(frozen, packed) / kept(trained, packed_step(trained, samples)),
        "packed_over_padded_bytes": kept(frozen, packed) / kept(plain, padded) / share,
        "logit_rows_over_supervised": rows / max(map(num_supervised, samples.packed)),
        "fill": samples.fill,
        "waits": waits.number / len(samples.packed),
    }


def model(way: int = 1) -> MultimodalLM:
    """Of the naive way (0) or of ours."""
    return small_model(small(stage_1("1.5B")[way]))


def some_samples(steps: int) -> Samples:
    """Those of the plan's first steps."""
    index, processor = draw(drawing())
    length, rows = product.layout(index.length, TOKENS)
    plan = Plan.from_lengths(index.length.tolist(), length, rows)
    dataset = PlannedBatches(index, plan, processor, Share(0, 1, rows))  # type: ignore[arg-type]
    numbers = [number for step in range(steps) for row in plan.rows(step) for number in row]
    return Samples(index, processor, list(batches(dataset, 0, steps, 0)), numbers, plan.fill())


Step = Callable[[bool], Any]
"""Forward, and backward where it is told to, through all samples."""


def packed_step(own: MultimodalLM, samples: Samples) -> Step:
    objective = product.NextToken(own)
    inputs = [
        {**inputs_of(batch, CPU, own, "token"), "samples": boundaries(batch["position_ids"])}  # as for a GPU
        for batch in samples.packed
    ]
    return lambda backward: [through(objective(**each), backward) for each in inputs]


def padded_step(own: MultimodalLM, samples: Samples) -> Step:
    """As many of the same samples as make whole batches."""
    assert own.vision_encoder.normalisation is not None
    data = naive.Samples(samples.index, samples.processor, own.vision_encoder.normalisation)  # type: ignore[arg-type]
    llava = naive.NaiveLlava(own)
    inputs = [naive.padded([data[number] for number in numbers]) for numbers in samples.in_batches]
    return lambda backward: [through(llava(**each), backward) for each in inputs]


def through(loss: torch.Tensor, backward: bool) -> torch.Tensor:
    if backward:
        loss.backward()
    return loss


def kept(own: MultimodalLM, step: Step) -> int:
    """Bytes kept for the backward pass, of all samples."""
    return bytes_for_backward(lambda: step(False), own)


def llm_flops(own: MultimodalLM, samples: Samples) -> float:
    """Operations with a weight of the LLM, its head among them, forward and backward, with a gradient of what goes
    in."""
    size = (samples.tokens // 64, 64, own.llm.get_input_embeddings().embedding_dim)
    states = torch.zeros(size, requires_grad=True)

    def call() -> None:
        own.logits(own.llm.get_decoder()(inputs_embeds=states, use_cache=False).last_hidden_state).sum().backward()

    return flops(call, attention=False)
