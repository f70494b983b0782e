"""A finished stage as the exporters take it: one model with nothing wrapped around its parts.

Enters: a stage folder or the Hub id of one. Leaves: a `Trained`: model in float32 with its LoRA merged, processor and
config. Merging in float32 is what keeps the merged model the trained one; the exporters round once, when they write.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from mllm.config import RunConfig, stage_run
from mllm.data.loader import DataConfig
from mllm.data.processor import Processor
from mllm.generate import find_folder
from mllm.models.build import ModelConfig, build_model, load_vision_model
from mllm.models.fused_encoder import FusedEncoder
from mllm.models.multimodal import MultimodalLM
from mllm.models.quantised import dequantise, is_quantised
from mllm.models.vision_encoder import VisionEncoder
from mllm.train.stage_folder import load_stage
from mllm.train.tuning.adapters import is_adapted, merge_adapter


@dataclass
class Trained:
    """What a stage left, ready to be written in another form."""

    folder: Path
    config: RunConfig
    parts: ModelConfig
    """The model section, in the dtype that it was trained with."""
    model: MultimodalLM
    processor: Processor

    @property
    def llm_config(self) -> Any:
        return self.model.llm.config

    @property
    def encoder(self) -> VisionEncoder:
        """The one vision encoder."""
        assert isinstance(self.model.vision_encoder, VisionEncoder), "several encoders have no stock class"
        return self.model.vision_encoder

    @property
    def takes_bytes(self) -> bool:
        """Several encoders that normalise differently: each does it itself, from the same uint8 pixels."""
        encoder = self.model.vision_encoder
        return isinstance(encoder, FusedEncoder) and not encoder.alike

    def exported_pixels(self, pixels: Tensor) -> Tensor:
        """[N, 3, H, W] as ours -> as a stock image processor makes them, normalised unless `takes_bytes`."""
        normalisation = self.processor.normalisation
        return pixels if normalisation is None or self.takes_bytes else normalisation(pixels)

    def vision_model(self) -> Any:
        """The encoder with all of its layers: ours is cut off behind the tap, stock classes expect the whole."""
        whole: Any = load_vision_model(replace(self.parts, dtype="float32"), self.parts.encoders()[0])
        whole.load_state_dict(self.encoder.model.state_dict(), strict=False)
        return whole


def load(
    name: str, adapter: Literal["merged", "beside", "left out"] = "merged", rounded_to: torch.dtype | None = None
) -> Trained:
    """Read a stage and merge its adapters; the LLM's may stay beside its weights (of four bits it does not), or be left
    out.

    `rounded_to` rounds the weights below an adapter, not the adapter.

    Raises:
        ValueError: there is no such stage, or its weights were drawn at random.
    """
    folder, config, parts, processor = read(name)
    # four bits are drawn from the weights as training read them
    exact = parts if parts.quantisation else replace(parts, dtype="float32")
    model = build_model(exact, processor.image_token_id, layout=processor.layout)
    load_stage(model, folder)
    if rounded_to:
        round_weights(model, rounded_to)
    if adapter == "left out" and is_adapted(model.llm):
        model.llm = model.llm.unload()
    merge_adapter(model, "vision_encoder")
    if adapter != "beside" or is_quantised(model.llm):
        merge_adapter(model, "llm")
    if is_quantised(model.llm):
        dequantise(model.llm)
        model.llm.differs_from_hub = True
    return Trained(folder, config, parts, model.float().eval().requires_grad_(False), processor)


def skeleton(name: str) -> Trained:
    """The same without a weight (meta device): enough to tell where the model lives, and to write its processor."""
    folder, config, parts, processor = read(name)
    with torch.device("meta"):
        model = build_model(
            replace(parts, random_weights=True, quantisation=None),
            processor.image_token_id,
            layout=processor.layout,
        )
    return Trained(folder, config, parts, model, processor)


def read(name: str) -> tuple[Path, RunConfig, ModelConfig, Processor]:
    """What a stage folder says of itself beside its weights."""
    folder = find_folder(name)
    config = stage_run(folder)
    parts = config.parts()
    if parts.random_weights:
        raise ValueError(f"{name} has model.random_weights: its parts exist nowhere, there is nothing to export")
    return folder, config, parts, Processor.load(folder / "processor")


def check_prompt(trained: Trained) -> None:
    """Refuse what no processor elsewhere does to pictures and prompts.

    Raises:
        ValueError: names the settings.
    """
    if why := prompt_obstacle(trained.processor):
        raise ValueError(f"a model trained with {why}. `mllm chat` and `mllm eval` run the stage as it is")


def prompt_obstacle(own: Processor | DataConfig) -> str:
    """The settings that keep a model from being exported, and why; empty where there are none."""
    known = {"tiles": ("none", "anyres"), "image_markers": ("none",), "image_fit": ("native", "pad")}
    found = [f"data.{name}: {getattr(own, name)}" for name in known if getattr(own, name) not in known[name]]
    if not found:
        return ""
    if own.image_fit == "aspect":
        why = (
            "Siglip2ImageProcessor makes these patches, but no processor there puts as many placeholders (Lfm2Vl's "
            "resizes pictures otherwise), and remote code brings no processor of its own"
        )
    else:
        why = "no processor there prepares pictures and prompts exactly so"
    return f"{', '.join(found)} is not exported: {why}"


def round_weights(model: MultimodalLM, dtype: torch.dtype) -> None:
    """As if they had been written in `dtype` and read in float32. No buffer: rotary frequencies stay as they are in
    every loader; no adapter."""
    for name, parameter in model.named_parameters():
        if ".lora_" not in name and parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype).float()
