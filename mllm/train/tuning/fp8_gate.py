"""How much may be multiplied in 8-bit floats before the gradient loses its direction, or the loss is another one?
Asked of the model, once a run.

Enters: the model as it trains, and the first micro-batch of this rank. Leaves: the same model with as many 8-bit
products as leave the gradient of all that trains a cosine of 0.99 to the one of the weights as they are, and the loss
within 0.1 %; `fp8.json`, from which a resumed run takes the same ones; or an end of the run. On a row of each rank, and
for the loss a few, with these weights; nothing is learned meanwhile.

How far a rounding of three bits turns the gradient hangs on the weights, and on how many layers a rounded number
passes. So what costs most and brings least is given up first (`python recipes/benchmark.py fp8`): the products of the
first blocks, whose rounding goes through all others; then those of the first half; then all, after which the loss is
that of the weights as they are; last gradients, which are a linear matter and turn little, in the first half. Whole
blocks, because kinds of layers save less for the same share, and a compiled block serves all that are like it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from mllm.models.multimodal import MultimodalLM
from mllm.train import engine
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
FURTHEST = 0.001
"""That both losses may lie apart, of their size: a fifth of what the curve may differ. A loss falls in a run, what
rounding adds to it stays: in the tiny recipe 0.4 % in the first step became 1.4 % on average and 2.6 % at worst."""
ROWS = 8
"""Of a micro-batch, whose losses are added: one row has too few supervised tokens."""
STEPS = ((0, 0), (1 / 8, 0), (1 / 4, 0), (1 / 2, 0), (1, 0), (1, 1 / 2))
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


@dataclass(frozen=True)
class Kept:
    """What a choice leaves of gradient and loss; None where nobody asked."""

    cosine: float | None = None
    loss: float | None = None
    """How much larger it is, of its size."""

    @property
    def enough(self) -> bool:
        """False also where one of them is no number."""
        assert self.cosine is not None
        assert self.loss is not None
        return self.cosine >= LEAST and abs(self.loss) <= FURTHEST

    def words(self) -> str:
        """For a person."""
        if self.cosine is None:
            return "nobody asked what that does to the gradient (train.probe is off)"
        return (
            f"the gradient of the first row has a cosine of {self.cosine:.4f} to that of the weights as they are, the "
            f"loss of the first rows differs by {self.loss:+.2%}"
        )


class Computed(NamedTuple):
    """Of some rows."""

    gradient: Tensor
    """Of all that trains, in the first row, float32."""
    loss: Tensor
    """The sum over the supervised tokens of all rows, float32."""


def choices(blocks: int) -> list[Choice]:
    """From all to the least, each a part of the one before; a shallow LLM has fewer."""
    return list(dict.fromkeys(Choice.at(first, second, blocks) for first, second in STEPS))


def choose(
    accelerator: Accelerator,
    model: MultimodalLM,
    train: TrainConfig,
    block: Sequence[Batch],
    resume: bool,
    say: Callable[[str], None],
) -> None:
    """Where `train.fp8` asks for it: what the run began with; or, with `train.probe`, the first choice that keeps
    direction and loss; or all.

    Raises:
        ValueError: none of them does; tells how far off the last one is.
    """
    if not train.fp8:
        return
    blocks = len(llm_blocks(model.llm))
    if known := from_main(lambda: read(train.output_dir)) if resume else None:
        found, kept = Choice(known["products_from"], known["gradients_from"]), Kept(known["cosine"], known["loss"])
        use(model, found)
    elif train.probe:
        found, kept = first_that_keeps(accelerator, model, split(block[0], 1)[:ROWS], choices(blocks))
    else:
        found, kept = Choice(), Kept()
    part, began = fp8.share(model, found.which), ", as the run began" if known else ""
    say(f"fp8{began}: {found.words(blocks)}, {part:.0%} of the frozen layers' operations; {kept.words()}")
    if accelerator.is_main_process and not known:
        record = {**asdict(found), "blocks": blocks, "share": round(part, 4), **asdict(kept)}
        durable.write_text(train.output_dir / FILE, json.dumps(record) + "\n")


def read(folder: Path) -> dict[str, Any] | None:
    """What an earlier part of this run wrote."""
    path = folder / FILE
    return json.loads(path.read_text()) if path.is_file() else None


def first_that_keeps(
    accelerator: Accelerator, model: MultimodalLM, rows: Sequence[Batch], ways: Sequence[Choice]
) -> tuple[Choice, Kept]:
    """The first of the choices with which direction and loss are kept; the model computes so from now on."""
    fp8.restore(model)
    full = computed(accelerator, model, rows)
    for way in ways:
        use(model, way)
        kept = compared(accelerator, computed(accelerator, model, rows), full)
        if kept.enough:
            return way, kept
    raise ValueError(
        f"train.fp8: even with 8-bit floats for no more than {way.words(len(llm_blocks(model.llm)))} {kept.words()}, "
        f"and a cosine of {LEAST} and a loss within {FURTHEST:.2%} are asked for: leave train.fp8 out, or train with "
        f"all of it all the same with train.probe false"
    )


def compared(accelerator: Accelerator, eight: Computed, full: Computed) -> Kept:
    """The worst cosine of all ranks, and the loss of their rows together; rank 0 tells all the same."""
    from accelerate.utils import broadcast

    own = cosine_similarity(eight.gradient, full.gradient, dim=0)
    if not (full.gradient.any() and full.gradient.isfinite().all()):  # no label is in the row
        own = torch.ones_like(own)
    seen = accelerator.gather(torch.stack([own, eight.loss, full.loss])[None])  # [ranks, 3]
    cosine, (found, expected) = seen[:, 0].min(), seen[:, 1:].sum(0)
    told = broadcast(torch.stack([cosine, found, expected])).tolist()
    return Kept(told[0], told[1] / told[2] - 1 if told[2] else 0.0)


def use(model: MultimodalLM, way: Choice) -> None:
    fp8.restore(model)
    fp8.convert(model, way.which)


def computed(accelerator: Accelerator, model: MultimodalLM, rows: Sequence[Batch]) -> Computed:
    """Row by row. Blocks run uncompiled, and kept features stay as they are."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    was, model.feature_cache = model.feature_cache, None
    devices = [accelerator.device] if accelerator.device.type == "cuda" else []
    gradients: Sequence[Tensor | None] = ()
    losses: list[Tensor] = []
    try:
        with torch.random.fork_rng(devices), torch.compiler.set_stance("force_eager"):
            torch.manual_seed(0)
            for row in rows:
                with engine.autocast(accelerator):
                    loss = NextToken(model)(**model_inputs(row, accelerator.device))
                if not losses:  # not `backward`, which would wake what waits for gradients to send them
                    gradients = torch.autograd.grad(loss, trained, allow_unused=True)
                losses.append(loss.detach().float())
    finally:
        model.feature_cache = was
    return Computed(
        torch.cat([each.flatten().float() for each in gradients if each is not None]), torch.stack(losses).sum()
    )
