"""Ids to a model: any vision encoder, any causal LLM, by Hub id or folder.

Enters: a `ModelConfig`. Leaves: a `MultimodalLM` with everything frozen (what trains is chosen in
`train/trainable.py`), or, from config files alone and before any weight is read, the number of visual tokens an
image becomes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn

from mllm.any_resolution import AnyResolution
from mllm.image_processor import load_image_processor, square_side
from mllm.models.connectors import ConnectorConfig, MLPConnector
from mllm.models.deferred import CannotDefer, deferred_llm
from mllm.models.fused_encoder import FusedEncoder
from mllm.models.image_newline import ImageNewline
from mllm.models.multimodal import MultimodalLM
from mllm.models.packed.choice import Attention, implementation
from mllm.models.quantised import check_installed, keep_layout, quantisation_config, quantise
from mllm.models.vision_encoder import VisionEncoder
from mllm.models.vision_grid import Grid, common_grids, grid, takes_any_size, vision_config
from mllm.native_aspect import NativeAspect
from mllm.schema import Schema
from mllm.types import Normalisation


@dataclass
class ModelConfig(Schema):
    """The three parts and how they are read."""

    vision_encoder: str | list[str]
    """Hub id or folder of a CLIP-style encoder; of a list the features stand side by side, patch by patch, and
    pictures are cut as the first one wants them."""
    llm: str
    """Hub id or folder of a causal LLM."""
    connector: ConnectorConfig = field(default_factory=MLPConnector)
    """What joins them."""
    feature_layer: int | list[int] = -2
    """Hidden state of the encoder that the connector reads; -2 is LLaVA's choice. Of a list the features stand side
    by side (VipLlava: -2, -5, -8, -11, 6)."""
    feature_norm: bool = False
    """Read it behind the encoder's final norm, as DeepseekVL and Cohere2Vision do, instead of before, as Llava does."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of the frozen weights. What trains is kept in float32."""
    attention: Attention = "auto"
    """The LLM's attention kernel; all isolate packed samples. `varlen` (torch's own, of FlashAttention), `flash`
    (flash-attn) and `flex` (FlexAttention) compute no pairs of tokens of different samples, on CUDA devices; nor does
    `by_sample`, sdpa on one sample after the other, on CPUs; `sdpa` and `eager` run anywhere. `auto` takes the first of
    these that the machine and the LLM can: on a CPU sdpa, or eager (Gemma 2)."""
    quantisation: Literal["nf4"] | None = None
    """Four bits a weight for the LLM's linear layers (NF4, bitsandbytes): a frozen LLM, or QLoRA with `train.lora`."""
    random_weights: bool = False
    """Draw all weights at random from the configs alone: for dry runs and benchmarks, never for training."""

    def encoders(self) -> list[str]:
        """Ids of the vision encoders; nearly always one."""
        return [self.vision_encoder] if isinstance(self.vision_encoder, str) else self.vision_encoder


def visual_tokens_per_image(config: ModelConfig) -> int:
    """V, from config files alone."""
    return config.connector.num_tokens(vision_grids(config)[0].num_patches)


def vision_grids(config: ModelConfig) -> list[Grid]:
    """The grid of each encoder, from config files alone.

    Raises:
        ValueError: an id or folder holds no encoder with patches, or the grids do not fit together.
    """
    from transformers import AutoConfig

    if not config.encoders():
        raise ValueError("model.vision_encoder is an empty list: name at least one encoder")
    own, any_size = [], []
    for name in config.encoders():
        with named("vision encoder", name):
            encoder = vision_config(AutoConfig.from_pretrained(name))
            own.append(grid(encoder, read_image_processor(name)[1]))
            any_size.append(takes_any_size(encoder))
    return common_grids(own, any_size)


def check_rows(config: ModelConfig) -> None:
    """Raises a `ValueError` where visual tokens have no place in the picture, and cannot be laid out as it."""
    if not config.connector.in_rows:
        raise ValueError(
            f"data.tiles anyres with a {config.connector.type} connector, whose visual tokens have no place in the "
            f"picture: set data.tiles dynamic, or choose mlp, linear, avg_pool, pixel_shuffle or c_abstractor"
        )


def check_aspect(config: ModelConfig) -> None:
    """Raises a `ValueError` where images cannot keep their aspect all the way to the LLM."""
    from transformers import AutoConfig

    names = config.encoders()
    kinds = [vision_config(AutoConfig.from_pretrained(name)).model_type for name in names]
    if kinds != ["siglip2_vision_model"]:
        raise ValueError(
            f"data.image_fit aspect with {' + '.join(kinds)}: SigLIP2 NaFlex alone, by itself, reads grids of any "
            f"aspect; set data.image_fit pad, or data.tiles"
        )
    if not config.connector.per_patch:
        raise ValueError(
            f"data.image_fit aspect with a {config.connector.type} connector, which needs a fixed grid of patches: "
            f"choose mlp or linear"
        )


def check_llm(config: ModelConfig) -> None:
    """Is there an LLM of that name? Asked of its config file, before anything large is read."""
    from transformers import AutoConfig

    with named("LLM", config.llm):
        AutoConfig.from_pretrained(config.llm)


def build_model(
    config: ModelConfig, image_token_id: int, deferred: bool = False, layout: AnyResolution | NativeAspect | None = None
) -> MultimodalLM:
    """Read both frozen parts, draw a fresh connector between them. `layout` is the processor's, where visual tokens
    follow an image's size; that of tiles brings a newline. Where the LLM is `deferred` its weights are read by whoever
    needs them, one at a time (`models/deferred.py`), if its files allow it.

    Raises:
        ValueError: an id or folder holds no such model.
    """
    encoder = build_encoder(config)
    llm = load_llm(config, deferred)
    width = llm.get_input_embeddings().embedding_dim
    connector = config.connector.build(encoder.width, width, encoder.num_patches)
    newline = ImageNewline(layout, width) if isinstance(layout, AnyResolution) else None
    model = MultimodalLM(encoder, connector, llm, image_token_id, newline)
    model.native_aspect = layout if isinstance(layout, NativeAspect) else None
    return model.requires_grad_(False)


def build_encoder(config: ModelConfig) -> VisionEncoder | FusedEncoder:
    """The vision encoder, or several as one."""
    encoders = [
        VisionEncoder(
            load_vision_model(config, name),
            config.feature_layer,
            read_image_processor(name)[0],
            grid,
            config.feature_norm,
        )
        for name, grid in zip(config.encoders(), vision_grids(config), strict=True)
    ]
    return FusedEncoder(encoders) if len(encoders) > 1 else encoders[0]


def load_vision_model(config: ModelConfig, name: str) -> nn.Module:
    """The vision half of the checkpoint; a text half, if it has one, is dropped."""
    from transformers import AutoConfig, AutoModel

    with named("vision encoder", name):
        options: dict[str, Any] = {"dtype": getattr(torch, config.dtype)}
        if config.random_weights:
            whole = AutoModel.from_config(vision_config(AutoConfig.from_pretrained(name)), **options)
        else:
            whole = AutoModel.from_pretrained(name, **options)
        return getattr(whole, "vision_model", whole)


def read_image_processor(name: str) -> tuple[Normalisation | None, int | None]:
    """What the encoder's image processor does to pixels and the side of its squares; nothing where the checkpoint has
    none (a dry run needs none)."""
    try:
        found = load_image_processor(name)
    except (OSError, ValueError):  # missing file; file without a type beside a config without one
        return None, None
    return Normalisation.of(found), square_side(found)


def load_llm(config: ModelConfig, deferred: bool = False) -> Any:
    """The causal LLM with the attention kernel of the config. One that cannot be deferred is read whole, and says so
    in `whole_because`."""
    from transformers import AutoConfig, AutoModelForCausalLM

    if config.quantisation:
        check_installed()
    with named("LLM", config.llm):
        dtype, attention = getattr(torch, config.dtype), attention_of(config)
        if deferred:
            try:
                if config.quantisation:
                    raise CannotDefer("model.quantisation packs whole weights")
                return deferred_llm(config.llm, dtype, attention, config.random_weights)
            except CannotDefer as reason:
                llm = load_llm(config)
                llm.whole_because = str(reason)
                return llm
        options: dict[str, Any] = {"dtype": dtype, "attn_implementation": attention}
        if config.random_weights:
            drawn = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(config.llm), **options)
            if config.quantisation:
                quantise(drawn, dtype)
            return drawn
        if config.quantisation:
            options["quantization_config"] = quantisation_config(dtype)
        llm = AutoModelForCausalLM.from_pretrained(config.llm, **options)
        keep_layout(llm)
        return llm


def attention_of(config: ModelConfig) -> str:
    """As transformers calls it."""
    from transformers import AutoConfig

    return implementation(config.attention, AutoConfig.from_pretrained(config.llm))


@contextlib.contextmanager
def named(part: str, name: str) -> Iterator[None]:
    """Say which part could not be read, in words that a user can act on."""
    try:
        yield
    except (OSError, ValueError) as error:
        first = str(error).strip().splitlines()[0]
        if "attention implementation" in first:
            raise ValueError(f"the {part} {name!r} needs another model.attention, e.g. eager ({first})") from error
        raise ValueError(f"no {part} at {name!r}: give a Hub id or a folder that holds one ({first})") from error
