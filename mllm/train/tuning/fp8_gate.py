"""How much may be multiplied in 8-bit floats before the gradient loses its direction? Asked of the model, once a run.

Enters: the model as it trains, and the first micro-batch of this rank. Leaves: the same model with as many 8-bit
products as leave the gradient of all that trains a cosine of 0.99 to the one of the weights as they are; `fp8.json`,
from which a resumed run takes the same ones; or an end of the run. On one row, with these weights; nothing is learned
meanwhile.

How far a rounding of three bits turns the gradient hangs on the weights, and on how many layers a rounded number
passes. So what costs most and brings least is given up first (`python recipes/benchmark.py fp8`): the products of the
first blocks, whose rounding goes through all others; then those of the first half; then the gradients there, which are
a linear matter and turn little; last the products everywhere, after which the loss is that of the weights as they are.
Whole blocks, because kinds of layers save less for the same share, and a compiled block serves all that are like it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from mllm.models.multimodal import MultimodalLM
from mllm.train.checkpoint import from_main
from mllm.train.halving import split
from mllm.train.losses import NextToken, model_inputs
from mllm.train.saving import durable
from mllm.train.tuning import fp8
from mllm.train.tuning.compiling import llm_blocks
from mllm.types import Batch

if TYPE_CHECKING:
    from accelerate import Accelerator

    from mllm.train.settings import TrainConfig

LEAST = 0.99
"""Of the cosine between both gradients, of all that trains."""
STEPS = ((0, 0), (1 / 8, 0), (1 / 4, 0), (1 / 2, 0), (1 / 2, 1 / 2), (1, 1 / 2))
"""In this order: the share of the blocks, from the first one on, whose products stay as the weights are, and that whose
gradients do."""
FILE = "fp8.json"


@dataclass(frozen=True)
class Choice:
    """What is multiplied in 8-bit floats."""

    products_from: int = 0
    """The number of the first block, from 0, whose products are."""
    gradients_from: int = 0
    """The same of the gradients of what goes in."""

    @classmethod
    def at(cls, products: float, gradients: float, blocks: int) -> Choice:
        """From shares of the blocks."""
        return cls(ceil(products * blocks), ceil(gradients * blocks))

    def which(self, name: str, block: int) -> tuple[bool, bool]:
        """Of one layer, as `fp8.convert` asks."""
        return block >= self.products_from, block >= self.gradients_from

    def words(self, blocks: int) -> str:
        """For a person, who counts from 1."""
        told = []
        if self.products_from < blocks:
            told.append(f"products from block {self.products_from + 1} of {blocks} on" if self.products_from else "all")
        if self.products_from:
            all_of_them = f"gradients from block {self.gradients_from + 1} of {blocks} on"
            told.append(all_of_them if self.gradients_from else "all gradients")
        return " and ".join(told)


def choices(blocks: int) -> list[Choice]:
    """From all to the least, each a part of the one before; a shallow LLM has fewer."""
    return list(dict.fromkeys(Choice.at(*shares, blocks) for shares in STEPS))


def choose(
    accelerator: Accelerator,
    model: MultimodalLM,
    train: TrainConfig,
    block: Sequence[Batch],
    resume: bool,
    say: Callable[[str], None],
) -> None:
    """Where `train.fp8` asks for it: what the run began with; or, with `train.probe`, the first choice that keeps the
    direction on every rank; or all.

    Raises:
        ValueError: none of them does; tells how far off the last one is.
    """
    if not train.fp8:
        return
    blocks = len(llm_blocks(model.llm))
    if known := from_main(lambda: read(train.output_dir)) if resume else None:
        found, cosine = Choice(known["products_from"], known["gradients_from"]), known["cosine"]
        use(model, found)
    elif train.probe:
        found, cosine = first_that_keeps(accelerator, model, split(block[0], 1)[0], choices(blocks))
    else:
        found, cosine = Choice(), None
    part, began = fp8.share(model, found.which), ", as the run began" if known else ""
    direction = f"a cosine of {cosine:.4f} to that of the weights as they are" if cosine else "a direction unasked for"
    say(
        f"fp8{began}: {found.words(blocks)}, {part:.0%} of the frozen layers' operations; the gradient of the first "
        f"row has {direction}"
    )
    if accelerator.is_main_process and not known:
        record = {**asdict(found), "blocks": blocks, "share": round(part, 4), "cosine": cosine}
        durable.write_text(train.output_dir / FILE, json.dumps(record) + "\n")


def read(folder: Path) -> dict[str, Any] | None:
    """What an earlier part of this run wrote."""
    path = folder / FILE
    return json.loads(path.read_text()) if path.is_file() else None


def first_that_keeps(
    accelerator: Accelerator, model: MultimodalLM, row: Batch, ways: Sequence[Choice]
) -> tuple[Choice, float]:
    """The first of the choices with which the direction is kept, and the cosine; the model computes so from now on.
    The worst of all ranks counts, as rank 0 sees it."""
    from accelerate.utils import broadcast

    fp8.restore(model)
    full = gradient(accelerator, model, row)
    says_something = bool(full.any() and full.isfinite().all())  # not where no label is in it
    for way in ways:
        use(model, way)
        own = cosine_similarity(gradient(accelerator, model, row), full, dim=0)
        own = own if says_something else torch.ones_like(own)
        worst = float(broadcast(accelerator.gather(own[None]).min()))
        if worst >= LEAST:
            return way, worst
    raise ValueError(
        f"train.fp8: even with 8-bit floats for no more than {way.words(len(llm_blocks(model.llm)))} the gradient of "
        f"the first row has a cosine of {worst:.4f} to that of the weights as they are, and {LEAST} is asked for: "
        f"leave train.fp8 out, or train with all of it all the same with train.probe false"
    )


def use(model: MultimodalLM, way: Choice) -> None:
    fp8.restore(model)
    fp8.convert(model, way.which)


def gradient(accelerator: Accelerator, model: MultimodalLM, batch: Batch) -> Tensor:
    """Of all that trains, in one row, float32. Blocks run uncompiled, and kept features stay as they are."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    was, model.feature_cache = model.feature_cache, None
    devices = [accelerator.device] if accelerator.device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices), torch.compiler.set_stance("force_eager"):
            torch.manual_seed(0)
            with accelerator.autocast():
                loss = NextToken(model)(**model_inputs(batch, accelerator.device))
            # not `backward`, which would wake what waits for gradients to send them
            found = torch.autograd.grad(loss, trained, allow_unused=True)
    finally:
        model.feature_cache = was
    return torch.cat([part.flatten().float() for part in found if part is not None])
