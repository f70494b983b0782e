"""Blocks that are compiled: `train.compile`.

Enters: a model whose trainable parts are chosen, before an engine wraps or shards it. Leaves: the same model, each
block of its LLM and of its encoder compiled by torch. All blocks of a part are alike, so that one is compiled and
serves all of them; what lies between blocks (embeddings, splice, connector, loss) changes its shape from micro-batch
to micro-batch and is left alone. What is compiled stays valid for the whole run: rows have one length, and the number
of images and of samples is left open (an H200 encodes as fast so as with a fixed number).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from mllm.models.multimodal import MultimodalLM
from mllm.models.quantised import is_quantised
from mllm.train.engines import zero
from mllm.train.tuning import encoder_groups
from mllm.train.tuning.adapters import encoder_layers

if TYPE_CHECKING:
    from accelerate import Accelerator

    from mllm.data.loader import DataConfig
    from mllm.train.settings import TrainConfig

BACKEND = "inductor"
VARIANTS = 64
"""Of one block's code: with and without gradients, in training and in use, by kinds of layers. torch stops at 8, and
would go on uncompiled without a word."""


def check(accelerator: Accelerator, train: TrainConfig, data: DataConfig, quantisation: str | None) -> None:
    """Stop where it cannot be done.

    Raises:
        ValueError: names the setting and what to do.
    """
    encoder_groups.check(accelerator, train, data)
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
    """Compile the blocks, and let the encoder see its images in groups, where that is asked for."""
    check(accelerator, train, data, "nf4" if is_quantised(model.llm) else None)
    model.encoder_batch = encoder_groups.chosen(accelerator, model, train)
    if not train.compile:
        return
    if model.llm.config._attn_implementation == "mllm_by_sample":
        raise ValueError(
            "train.compile with model.attention by_sample, which looks at each sample: set model.attention to sdpa"
        )
    torch._dynamo.config.recompile_limit = max(VARIANTS, torch._dynamo.config.recompile_limit)
    model.fewest_images = 2
    # forward alone: hooks around it (the tap of an encoder, what FSDP2 puts together) stay as they are
    for block in llm_blocks(model.llm):
        block.forward = torch.compile(block.forward, backend=BACKEND)  # type: ignore[method-assign]
    for block in encoder_blocks(model.vision_encoder):
        block.forward = of_any_number(torch.compile(block.forward, backend=BACKEND))  # type: ignore[method-assign]


def of_any_number(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Compiled once for any number of images from two on: of one alone torch makes code that knows it is one."""

    @functools.wraps(forward)
    def marked(*given: Any, **named: Any) -> Any:
        torch._dynamo.maybe_mark_dynamic(given[0] if given else named["hidden_states"], 0)
        return forward(*given, **named)

    return marked


def llm_blocks(llm: Any) -> list[nn.Module]:
    """The layers of the LLM, by the class that transformers never splits."""
    kinds = llm._no_split_modules or ()
    return [module for module in llm.modules() if type(module).__name__ in kinds]


def encoder_blocks(encoder: Any) -> list[nn.Module]:
    """The layers of the encoder, or of each of several."""
    return [block for one in getattr(encoder, "encoders", (encoder,)) for block in encoder_layers(one.model)]
