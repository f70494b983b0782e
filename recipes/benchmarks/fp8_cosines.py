"""How far 8-bit floats turn the gradient of the connector, by what is multiplied with them.

Enters: models with the depth and the proportions of Qwen2.5, narrow ones with weights at random, and rows of drawn
captions; or any model and rows. Leaves: for each way of choosing, its share of the frozen layers' operations and the
cosine between its gradient and that of the weights as they are, as the run's own gate computes both
(`mllm/train/tuning/fp8_gate.py`). A CPU multiplies the very e4m3 numbers, in float32: what a GPU adds by its own sums
and by bfloat16 is smaller by far.

Narrower by a factor, weights are larger by its root: then each layer adds as much to what it is given as in the wide
one, whose weights have a deviation of 0.02.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import Any

import torch
from accelerate import Accelerator
from torch.nn.functional import cosine_similarity

from benchmarks.drawn_training import Drawing, draw
from benchmarks.ratios import ENCODER
from benchmarks.sizes import ENCODERS, LLMS, draw_encoder
from mllm.data.loader import PlannedBatches, Share, batches
from mllm.data.plan import Plan
from mllm.models.connectors import MLPConnector
from mllm.models.multimodal import MultimodalLM
from mllm.train.trainable import LearningRates, choose_trainable
from mllm.train.tuning import fp8
from mllm.train.tuning.compiling import llm_blocks
from mllm.train.tuning.fp8 import Which
from mllm.train.tuning.fp8_gate import STEPS, Choice, Kept, computed
from mllm.types import Batch

NARROWER = {"1.5B": 8, "7B": 16}
"""The LLMs that are drawn, and how much narrower than the real ones."""
WORDS = 2048
"""Of the vocabulary."""
LENGTH = 256
"""Tokens of a row: two pictures or three of 64 with their captions."""
DEVIATION = 0.02
GATE = dict(
    zip(
        (
            "gate 1: no products in the first eighth of the blocks",
            "gate 2: no products in the first quarter",
            "gate 3: no products in the first half",
            "gate 4: no products",
            "gate 5: gradients of the second half alone",
        ),
        STEPS[1:],
        strict=True,
    )
)
"""What the gate takes in the place of all, by its words."""


def without(*names: str) -> Which:
    """All layers but those whose names end so."""
    return lambda name, block: (not name.endswith(names),) * 2


def ways(blocks: int) -> dict[str, Which]:
    """By its words what is multiplied in 8-bit floats."""
    return {
        "all": fp8.everything,
        "all but q_proj, k_proj, v_proj, o_proj": without("q_proj", "k_proj", "v_proj", "o_proj"),
        "all but o_proj": without("o_proj"),
        "all but gate_proj, up_proj": without("gate_proj", "up_proj"),
        "all but down_proj": without("down_proj"),
        "all but the last quarter of the blocks": lambda name, block: (block < 3 * blocks / 4,) * 2,
        "all but the first quarter of the blocks": lambda name, block: (block >= blocks / 4,) * 2,
        "products, no gradients": lambda name, block: (True, False),
        **{words: Choice.at(*shares, blocks).which for words, shares in GATE.items()},
    }


def asked(model: MultimodalLM, rows: Sequence[Batch]) -> dict[str, Any]:
    """Of each way the share, the median cosine of the rows and the least, and how much larger the loss of all is; and
    which way the gate would take, if each row were a rank's."""
    blocks, accelerator = len(llm_blocks(model.llm)), Accelerator(cpu=True)
    fp8.restore(model)
    full = [computed(accelerator, model, [row]) for row in rows]
    found: dict[str, Any] = {}
    for words, which in ways(blocks).items():
        fp8.restore(model)
        fp8.convert(model, which)
        eight = [computed(accelerator, model, [row]) for row in rows]
        pairs = list(zip(eight, full, strict=True))
        cosines = [float(cosine_similarity(one.gradient, other.gradient, dim=0)) for one, other in pairs]
        loss = float(sum(one.loss for one in eight) / sum(one.loss for one in full)) - 1
        found[words] = {
            "share": fp8.share(model, which),
            "cosine": median(cosines),
            "least": min(cosines),
            "loss": loss,
        }
    fp8.restore(model)
    kept = [words for words in ("all", *GATE) if Kept(found[words]["least"], found[words]["loss"]).enough]
    return {"blocks": blocks, "rows": len(rows), "ways": found, "chosen": kept[0] if kept else None}


def narrow(name: str, by: int, layers: int | None = None, seed: int = 0) -> MultimodalLM:
    """An LLM of that size's proportions behind the small encoder; the connector trains."""
    from transformers import AutoModelForCausalLM, Qwen2Config

    whole = LLMS[name]
    shape = {key: whole[key] // by for key in ("hidden_size", "intermediate_size")}
    layers = layers or whole["num_hidden_layers"]
    own = {"vocab_size": WORDS, "num_hidden_layers": layers, "initializer_range": DEVIATION * by**0.5}
    torch.manual_seed(seed)
    llm: Any = AutoModelForCausalLM.from_config(Qwen2Config(**{**whole, **shape, **own}), attn_implementation="sdpa")
    encoder = draw_encoder(ENCODER, torch.float32)
    connector = MLPConnector().build(encoder.width, shape["hidden_size"], encoder.num_patches)
    model = MultimodalLM(encoder, connector, llm, WORDS - 1)
    choose_trainable(model, LearningRates(connector=1e-3), None)
    return model


def drawn_rows(number: int) -> list[Batch]:
    """Rows of captions, each a micro-batch."""
    side, patch = (ENCODERS[ENCODER][1][key] for key in ("image_size", "patch_size"))
    index, processor = draw(Drawing("captions", (side // patch) ** 2, side, WORDS, samples=64))
    plan = Plan.from_lengths(index.length.tolist(), LENGTH, 1)
    dataset = PlannedBatches(index, plan, processor, Share(0, 1, 1))  # type: ignore[arg-type]
    return list(batches(dataset, 0, number, 0))
