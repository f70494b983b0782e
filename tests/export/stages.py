"""Small finished stages of real classes: parts in Hub format, and a stage folder made of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    CLIPImageProcessor,
    Dinov2Config,
    Dinov2WithRegistersConfig,
    Gemma2Config,
    GPTNeoXConfig,
    LlamaConfig,
    Qwen2Config,
    Qwen3Config,
    SiglipImageProcessor,
    SiglipVisionConfig,
    ViTConfig,
    ViTImageProcessor,
)

from conftest import IMAGE_SIZE, PATCH, TINY_LLM, make_clip, make_image_processor, make_processor, make_tokenizer
from mllm.config import RunConfig, dump_config
from mllm.data.loader import DataConfig
from mllm.data.processor import Processor
from mllm.models.build import ModelConfig, build_model, visual_tokens_per_image
from mllm.models.connectors import MLPConnector
from mllm.train.settings import TrainConfig
from mllm.train.stage_folder import save_stage
from mllm.train.trainable import LearningRates, Lora, choose_trainable

SMALL = {"hidden_size": 24, "intermediate_size": 48, "num_attention_heads": 2, "num_hidden_layers": 3}
PICTURE = {"image_size": IMAGE_SIZE, "patch_size": PATCH}
SIDES = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
VISION = {
    "siglip": (SiglipVisionConfig, SiglipImageProcessor(size=SIDES)),
    "siglip_fine": (SiglipVisionConfig, SiglipImageProcessor(size=SIDES)),
    "vit": (ViTConfig, ViTImageProcessor(size=SIDES)),
    "dinov2": (Dinov2Config, CLIPImageProcessor(size={"shortest_edge": IMAGE_SIZE}, crop_size=SIDES)),
    "registers": (Dinov2WithRegistersConfig, CLIPImageProcessor(size={"shortest_edge": IMAGE_SIZE}, crop_size=SIDES)),
}
ROPE = {"rope_type": "default", "rope_theta": 5e5}
"""Not the default of any family: a reader that misses it computes something else."""
LLMS = {
    "llama": (LlamaConfig, {"rope_parameters": ROPE}),
    "qwen2": (Qwen2Config, {"rope_parameters": ROPE, "tie_word_embeddings": True}),
    "qwen3": (Qwen3Config, {"rope_parameters": ROPE}),
    "gemma2": (Gemma2Config, {"query_pre_attn_scalar": 8, "final_logit_softcapping": 3.0}),
    "gpt_neox": (GPTNeoXConfig, {"rotary_pct": 0.5}),
}


def make_parts(
    folder: Path,
    encoder: str = "clip",
    llm: str = "llama",
    template: Any = None,
    prefix_space: bool = False,
    bos: bool = False,
    **changes: Any,
) -> None:
    """`encoder/` and `llm/` in Hub format; `changes` are the LLM's, the two before them its tokenizer's."""
    torch.manual_seed(0)
    if encoder == "clip":
        vision, images = make_clip(), make_image_processor()
    else:
        kind, images = VISION[encoder]
        extra = {"mlp_ratio": 2} if "Dinov2" in kind.__name__ else {}
        if encoder.endswith("fine"):  # 4 x 4 patches: blocks have neighbours
            extra = {"patch_size": PATCH // 2}
        vision = AutoModel.from_config(kind(**{**SMALL, **PICTURE, **extra}))
        torch.manual_seed(1)
        for parameter in vision.parameters():  # many of these are born as zeros and ones
            parameter.data += 0.1 * torch.randn_like(parameter)
    vision.save_pretrained(folder / "encoder")
    images.save_pretrained(folder / "encoder")
    kind, own = LLMS[llm]
    torch.manual_seed(2)
    model = AutoModelForCausalLM.from_config(kind(**{"vocab_size": 384, **TINY_LLM, **own, **changes}))
    with torch.no_grad():
        for parameter in model.parameters():  # sharp enough that greedy answers differ from prompt to prompt
            parameter += 0.2 * torch.randn_like(parameter)
    model.save_pretrained(folder / "llm")
    tokenizer = make_tokenizer(**({"chat_template": template} if template else {}))
    if prefix_space:
        tokenizer.backend_tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=True)
    if bos:  # of its own accord, where the template prints none
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.save_pretrained(folder / "llm")


def make_stage(
    folder: Path,
    connector: Any = None,
    lora: bool | Lora = False,
    image_fit: str = "native",
    data: DataConfig | None = None,
    out: Path | None = None,
    **model: Any,
) -> Path:
    """A finished stage of the parts that lie in `folder`; its connector and adapter are random, as if trained."""
    named = {"vision_encoder": str(folder / "encoder"), "llm": str(folder / "llm"), **model}
    parts = ModelConfig(**{"connector": connector or MLPConnector(), **named})  # type: ignore[arg-type]
    out = out or folder / "stage"
    processor = Processor.from_hub(parts.llm, parts.encoders()[0], visual_tokens_per_image(parts), image_fit=image_fit)
    data = data or DataConfig()
    processor = replace(processor, tiles=data.tiles, max_tiles=data.max_tiles)
    torch.manual_seed(3)
    built = build_model(parts, processor.image_token_id, layout=processor.layout)
    adapter = (Lora(rank=4, alpha=8) if lora is True else lora) or None
    rates = LearningRates(connector=1e-3, llm=1e-3 if adapter else None)
    choose_trainable(built, rates, adapter)
    with torch.no_grad():
        for parameter in built.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)
    out.mkdir(parents=True, exist_ok=True)
    train = TrainConfig(output_dir=out, learning_rate=rates, lora=adapter)
    save_stage(out, built, processor, dump_config(RunConfig(train, data, parts)))
    return out


__all__ = ["make_parts", "make_processor", "make_stage"]
