"""Models of real sizes with random weights, drawn on the device: no Hub, no files.

Enters: the name of an LLM, of an encoder, a device. Leaves: a `MultimodalLM` of the product's own classes, frozen. The
numbers are those of the published config.json files; speed hangs on them, not on what the weights have learned.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from mllm.models.connectors import ConnectorConfig, MLPConnector
from mllm.models.multimodal import MultimodalLM
from mllm.models.vision_encoder import VisionEncoder
from mllm.types import Normalisation

QWEN = {
    "vocab_size": 151936,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0},
    "max_position_embeddings": 32768,
}
"""What the sizes of Qwen2.5 have in common."""


def qwen(hidden: int, intermediate: int, layers: int, heads: int, **own: Any) -> dict[str, Any]:
    shape = {"hidden_size": hidden, "intermediate_size": intermediate, "num_hidden_layers": layers}
    return {**QWEN, **shape, "num_attention_heads": heads, **own}


LLMS = {
    "tiny": qwen(64, 176, 2, 4, vocab_size=2048),
    "small": qwen(128, 352, 4, 4, vocab_size=2048),
    "0.5B": qwen(896, 4864, 24, 14),
    "1.5B": qwen(1536, 8960, 28, 12),
    "3B": qwen(2048, 11008, 36, 16),
    "7B": qwen(3584, 18944, 28, 28, num_key_value_heads=4, vocab_size=152064, tie_word_embeddings=False),
}
"""Qwen2.5 by size, and two for CPUs."""


def vit(hidden: int, intermediate: int, layers: int, heads: int, side: int) -> dict[str, int]:
    shape = {"hidden_size": hidden, "intermediate_size": intermediate, "num_hidden_layers": layers}
    return {**shape, "num_attention_heads": heads, "image_size": side, "patch_size": 14}


ENCODERS = {
    "tiny": ("siglip_vision_model", vit(64, 128, 3, 4, 56)),
    "small": ("siglip_vision_model", vit(64, 128, 3, 4, 112)),
    "so400m-384": ("siglip_vision_model", vit(1152, 4304, 27, 16, 384)),
    "clip-l-336": ("clip_vision_model", vit(1024, 4096, 24, 16, 336)),
}
"""Architecture and sizes; 16, 64, 729 and 576 patches."""
NORMALISATIONS = {
    "siglip_vision_model": Normalisation(1 / 255, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "clip_vision_model": Normalisation(
        1 / 255, (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    ),
}


def draw_model(
    llm: str,
    encoder: str,
    device: torch.device | str,
    dtype: torch.dtype = torch.bfloat16,
    attention: str = "sdpa",
    connector: ConnectorConfig | None = None,
    image_token_id: int | None = None,
    seed: int = 0,
) -> MultimodalLM:
    """All three parts on the device; the connector in float32, as where it trains. The placeholder is the last token
    of the vocabulary where none is given."""
    torch.manual_seed(seed)
    with torch.device(device):
        language = draw_llm(llm, dtype, attention)
        vision = draw_encoder(encoder, dtype)
        width = language.get_input_embeddings().embedding_dim
        joint = (connector or MLPConnector()).build(vision.width, width, vision.num_patches)
    placeholder = LLMS[llm]["vocab_size"] - 1 if image_token_id is None else image_token_id
    return MultimodalLM(vision, joint, language, placeholder).requires_grad_(False)


def draw_llm(name: str, dtype: torch.dtype, attention: str) -> Any:
    """On torch's current device."""
    from transformers import AutoModelForCausalLM, Qwen2Config

    return AutoModelForCausalLM.from_config(Qwen2Config(**LLMS[name]), dtype=dtype, attn_implementation=attention)


def draw_encoder(name: str, dtype: torch.dtype) -> VisionEncoder:
    """On torch's current device."""
    from transformers import AutoConfig, AutoModel

    kind, shape = ENCODERS[name]
    whole: nn.Module = AutoModel.from_config(AutoConfig.for_model(kind, **shape), dtype=dtype)
    return VisionEncoder(getattr(whole, "vision_model", whole), normalisation=NORMALISATIONS[kind])
