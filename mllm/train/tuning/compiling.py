"""Blocks that are compiled: `train.compile`.

Enters: a model whose trainable parts are chosen, before an engine wraps or shards it. Leaves: the same model, each
block of its LLM and of its encoder compiled by torch. All blocks of a part are alike, so that one is compiled and
serves all of them; what lies between blocks (embeddings, splice, connector, loss) changes its shape from micro-batch
to micro-batch and is left alone. Rows of one length, images in groups of one size and boundaries of samples without a
fixed number (`packed/boundaries.py`) keep what is compiled valid for the whole run.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from mllm.models.multimodal import MultimodalLM
from mllm.models.quantised import is_quantised
from mllm.train.engines import fsdp, zero
from mllm.train.tuning.adapters import encoder_layers

if TYPE_CHECKING:
    from accelerate import Accelerator

    from mllm.data.loader import DataConfig
    from mllm.train.settings import TrainConfig

GROUP = 32
"""Images at a time: of SO400M-384 on an H200, 571 a second in groups of 8, 632 of 16, 662 of 32, 641 of 64."""
BACKEND = "inductor"
VARIANTS = 64
"""Of one block's code: with and without gradients, in training and in use, by kinds of layers. torch stops at 8, and
would go on uncompiled without a word."""


def check(accelerator: Accelerator, train: TrainConfig, data: DataConfig, quantisation: str | None) -> None:
    """Stop where it cannot be done.

    Raises:
        ValueError: names the setting and what to do.
    """
    sharded = zero.stage(accelerator) == 3 or fsdp.requested()
    if train.encoder_batch and sharded:
        raise ValueError(
            "train.encoder_batch where the encoder is sharded (ZeRO stage 3, FSDP2): ranks with more images would call "
            "it more often, and wait for the others for ever: use ZeRO stage 2, or leave it out"
        )
    if not train.compile:
        return
    if zero.stage(accelerator) == 3:
        raise ValueError(
            "train.compile under DeepSpeed ZeRO stage 3, which puts weights together inside of each block: "
            "use ZeRO stage 2 or FSDP2, or set train.compile to false"
        )
    if quantisation:
        raise ValueError(
            f"train.compile with model.quantisation {quantisation}, whose kernels cannot be compiled: "
            f"set one of them to its default"
        )
    if not data.packing:
        raise ValueError(
            "train.compile without data.packing: rows of many lengths would be compiled one by one; "
            "set data.packing to true, or train.compile to false"
        )


def switch_on(accelerator: Accelerator, model: MultimodalLM, train: TrainConfig, data: DataConfig) -> None:
    """Compile the blocks, and let the encoder see its images in groups. A sharded encoder stays as it is: its ranks
    have to call it alike."""
    check(accelerator, train, data, "nf4" if is_quantised(model.llm) else None)
    is_whole = not fsdp.requested() and zero.stage(accelerator) != 3
    model.encoder_batch = (train.encoder_batch or (GROUP if train.compile else None)) if is_whole else None
    if not train.compile:
        return
    if model.llm.config._attn_implementation == "mllm_by_sample":
        raise ValueError(
            "train.compile with model.attention by_sample, which looks at each sample: set model.attention to sdpa"
        )
    torch._dynamo.config.recompile_limit = max(VARIANTS, torch._dynamo.config.recompile_limit)
    for block in [*llm_blocks(model.llm), *(encoder_blocks(model.vision_encoder) if is_whole else [])]:
        # its forward alone: hooks around it (the tap of an encoder, what FSDP2 puts together) stay as they are
        block.forward = torch.compile(block.forward, backend=BACKEND)  # type: ignore[method-assign]


def llm_blocks(llm: Any) -> list[nn.Module]:
    """The layers of the LLM, by the class that transformers never splits."""
    kinds = llm._no_split_modules or ()
    return [module for module in llm.modules() if type(module).__name__ in kinds]


def encoder_blocks(encoder: Any) -> list[nn.Module]:
    """The layers of the encoder, or of each of several."""
    return [block for one in getattr(encoder, "encoders", (encoder,)) for block in encoder_layers(one.model)]
