"""What is measured: each configuration by its name, with what sets it apart.

Enters: nothing. Leaves: the list, the most telling first, so that a run that is cut off has measured those.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from benchmarks.sizes import LLMS
from mllm.models.packed.choice import Attention, implementation
from mllm.train.trainable import LearningRates
from mllm.train.tuning.adapters import Lora


@dataclass(frozen=True)
class Configuration:
    """One row of the table."""

    name: str
    words: str
    llm: str
    encoder: str = "so400m-384"
    way: Literal["naive", "product", "bare"] = "product"
    """The plain loop of `naive`, the product's own loop, or the product's model without loop and loader."""
    kind: Literal["captions", "instruct"] = "captions"
    """The mix of samples."""
    lora: bool = False
    """The second stage: LoRA of rank 16 on all linear layers of the LLM; else the connector alone trains."""
    fast_lora: bool = True
    """Adapters by the short way of `mllm/train/tuning/fast_lora.py`; else as peft computes them."""
    attention: Attention = "sdpa"
    checkpointing: bool = False
    full_logits: bool = False
    """Float32 logits at every position in place of the product's loss."""
    compiled: bool = False
    fp8: bool = False
    cached: bool = False
    """Features of images are kept."""
    beside: str = ""
    """The configuration that it is compared with."""

    @property
    def accumulation(self) -> int:
        """Micro-batches of a step, as large runs have several: the encoder takes the images of a step together. Fewer
        where a step would take many seconds."""
        if self.way == "naive" or self.llm in ("tiny", "small"):
            return 1
        return 4 if self.llm in ("3B", "7B") or self.lora or not self.compiled else 8

    @property
    def weight(self) -> float:
        """About what a token costs, in time that it is given."""
        return {"0.5B": 0.7, "3B": 1.7, "7B": 3.0}.get(self.llm, 1.0)

    @property
    def rates(self) -> LearningRates:
        return LearningRates(connector=2e-5, llm=2e-4) if self.lora else LearningRates(connector=1e-3)

    @property
    def adapter(self) -> Lora | None:
        return Lora(rank=16, alpha=32) if self.lora else None


FIRST = ("B4 1.5B", "S2 7B", "B0 1.5B", "B4 7B", "S2 naive 7B", "B5 1.5B", "U 1.5B", "B0 7B", "B5 7B", "B4 0.5B")
"""What says most, in this order."""


def configurations() -> list[Configuration]:
    """All of them, in the order in which they are measured."""
    known = [
        *(row for llm in ("1.5B", "7B") for row in (*stage_1(llm), *stage_2(llm))),
        *(replace(default(llm), beside="") for llm in ("0.5B", "3B")),
        replace(default("1.5B"), name="CLIP 1.5B", words="B4 with CLIP-L-336, 576 tokens", encoder="clip-l-336"),
    ]
    return sorted(known, key=lambda row: FIRST.index(row.name) if row.name in FIRST else len(FIRST))


def default(llm: str) -> Configuration:
    """What the product does on a GPU where nothing else is asked for."""
    words = "packed, loss at supervised rows, compiled"
    return Configuration(f"B4 {llm}", words, llm, attention="varlen", compiled=True, beside=f"B0 {llm}")


def stage_1(llm: str) -> list[Configuration]:
    """The first stage on captions, from the naive way to all that is there; of 7B those that say most."""
    best = default(llm)
    eager = replace(best, compiled=False)
    rows = [
        Configuration(f"B0 {llm}", "naive: padded, checkpointing, all logits", llm, way="naive", checkpointing=True),
        replace(best, name=f"B4 {llm}"),
        replace(best, name=f"U {llm}", words="B4 without loop and loader", way="bare", beside=f"B4 {llm}"),
        Configuration(f"B1 {llm}", "naive without checkpointing", llm, way="naive", beside=f"B0 {llm}"),
        replace(eager, name=f"B2 {llm}", words="packed, all logits", full_logits=True),
        replace(eager, name=f"B3 {llm}", words="packed, loss at supervised rows"),
        replace(best, name=f"B6 {llm}", words="B4 with kept features", cached=True),
        replace(best, name=f"B5 {llm}", words="B4 with fp8 in frozen layers", fp8=True),
    ]
    return rows if llm == "1.5B" else [row for row in rows if row.name[:2] in ("B0", "B4", "B5")]


def stage_2(llm: str) -> list[Configuration]:
    """LoRA on conversations, both ways, and ours with adapters as peft computes them."""
    naive = Configuration(
        f"S2 naive {llm}",
        "LoRA, naive: padded, checkpointing, all logits",
        llm,
        way="naive",
        kind="instruct",
        lora=True,
        checkpointing=True,
    )
    ours = replace(default(llm), name=f"S2 {llm}", kind="instruct", lora=True, beside=naive.name)
    ours = replace(ours, words="LoRA, packed, supervised rows, compiled")
    peft = replace(ours, name=f"S2 peft {llm}", words="S2, adapters by peft", fast_lora=False, beside=ours.name)
    return [ours, naive, peft]


def attention(row: Configuration) -> str:
    """The attention function as transformers knows it."""
    from transformers import Qwen2Config

    return implementation(row.attention, Qwen2Config(**LLMS[row.llm]))
