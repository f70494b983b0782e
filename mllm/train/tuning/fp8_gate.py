"""Does the gradient keep its direction where frozen weights are 8-bit floats? Asked of the model itself, once.

Enters: the model as it trains, and the first micro-batch of this rank. Leaves: nothing, or an end of the run. How much
a rounding of three bits turns the gradient hangs on the weights: on how deep the LLM is, and how much each layer adds
to what it is given. So it is measured, on one row, with these weights, by both ways; nothing is learned meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from mllm.models.multimodal import MultimodalLM
from mllm.train.halving import split
from mllm.train.losses import NextToken, model_inputs
from mllm.train.tuning import fp8
from mllm.types import Batch

if TYPE_CHECKING:
    from accelerate import Accelerator

    from mllm.train.settings import TrainConfig

LEAST = 0.99
"""Of the cosine between both gradients, of all that trains."""


def check_direction(
    accelerator: Accelerator,
    model: MultimodalLM,
    train: TrainConfig,
    block: Sequence[Batch],
    say: Callable[[str], None],
) -> None:
    """Where `train.fp8` and `train.probe` ask for it; the worst of all ranks counts.

    Raises:
        ValueError: the direction is lost; tells how far.
    """
    if not (train.fp8 and train.probe):
        return
    row = split(block[0], 1)[0]
    eight = gradient(accelerator, model, row)
    fp8.restore(model)
    full = gradient(accelerator, model, row)
    fp8.convert(model)
    own = cosine_similarity(eight, full, dim=0) if full.any() else torch.ones((), device=full.device)  # no label in it
    found = float(accelerator.gather(own[None]).min())
    say(f"fp8: the gradient of the first row has a cosine of {found:.4f} to that of the weights as they are")
    if found < LEAST:
        raise ValueError(
            f"train.fp8: the gradient of the first row has a cosine of {found:.4f} to that of the weights as they are, "
            f"and {LEAST} is asked for: leave train.fp8 out, or train so all the same with train.probe false"
        )


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
