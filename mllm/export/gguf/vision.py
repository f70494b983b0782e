"""The mmproj half: a vision encoder without class token, and the connector.

Enters: a `Trained`. Leaves: a `File` as llama.cpp's `clip.cpp` reads it, with projector type `mlp`.
"""

from __future__ import annotations

import re
from typing import Any

from torch import Tensor

from mllm.export.gguf.file import File
from mllm.export.homes import is_two_layers
from mllm.export.layout import published_names
from mllm.export.llava import activation, projector
from mllm.export.trained import Trained
from mllm.models.multimodal import MultimodalLM
from mllm.models.vision_encoder import VisionEncoder

ENCODERS = ("siglip_vision_model",)
GELUS = ("gelu", "gelu_new", "gelu_pytorch_tanh")
"""Activations of the encoder that llama.cpp has as its one GELU; the other that it knows is quick_gelu."""
FEATURE_LAYER = "clip.vision.feature_layer"
"""Which hidden state is read; without it llama.cpp takes the last but one."""
LAYER = re.compile(r"vision_model\.encoder\.layers\.(\d+)\.")


def obstacles(model: MultimodalLM) -> list[str]:
    """Why llama.cpp cannot run encoder and connector, or would run them wrong."""
    encoder, connector = model.vision_encoder, model.connector
    if not isinstance(encoder, VisionEncoder):
        return ["several encoders: llama.cpp runs one"]
    found = []
    if model.image_newline is not None:
        found.append("tiles with a newline: the projector that is written has neither")
    if encoder.num_prefix_tokens:
        found.append(
            "an encoder with a class token: llama.cpp gets its positions wrong (its issue 25814); SigLIP has none"
        )
    elif encoder.model.config.model_type not in ENCODERS:
        found.append(f"a {encoder.model.config.model_type} encoder (known: {', '.join(ENCODERS)})")
    elif encoder.model.config.hidden_act not in (*GELUS, "quick_gelu"):
        found.append(f"an encoder with {encoder.model.config.hidden_act} (known: {', '.join(GELUS)}, quick_gelu)")
    if len(encoder.taps) > 1:
        found.append("features of several layers")
    if encoder.feature_norm:
        found.append("features behind the encoder's final norm: llama.cpp reads before it")
    if not is_two_layers(connector) or activation(connector) != "gelu":
        found.append("the connector is not two linear layers with GELU between them")
    return found


def describe(trained: Trained) -> File:
    """Everything that goes into the file."""
    encoder = trained.encoder
    config, tap = encoder.model.config, encoder.taps[0] + 1
    images = trained.processor.image_processor
    settings: list[tuple[Any, ...]] = [
        ("add_type", "mmproj"),
        ("add_clip_has_vision_encoder", True),
        ("add_clip_projector_type", "mlp"),
        ("add_vision_image_size", encoder.grid.side),
        ("add_vision_patch_size", encoder.grid.patch),
        ("add_vision_embedding_length", config.hidden_size),
        ("add_vision_feed_forward_length", config.intermediate_size),
        ("add_vision_projection_dim", trained.llm_config.hidden_size),
        ("add_vision_block_count", tap),
        ("add_vision_head_count", config.num_attention_heads),
        ("add_vision_attention_layernorm_eps", config.layer_norm_eps),
        ("add_vision_image_mean", [float(value) for value in images.image_mean]),
        ("add_vision_image_std", [float(value) for value in images.image_std]),
        ("add_vision_use_gelu", config.hidden_act in GELUS),
    ]
    return File(
        "clip",
        [*settings, ("add_array", FEATURE_LAYER, [tap])],
        {**encoder_tensors(trained, tap), **connector_tensors(trained)},
    )


def encoder_tensors(trained: Trained, depth: int) -> dict[str, Tensor]:
    """Patches, positions and the layers up to the tap; what lies behind it is not read."""
    import gguf

    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.MMPROJ, depth)
    found = {}
    for name, tensor in published_names(trained.encoder.model).items():
        layer = LAYER.search(name)
        if "embeddings" not in name and layer is None:
            continue  # final norm and pooling head
        renamed = names.get_name(f"vision_tower.{name}", try_suffixes=(".weight", ".bias"))
        assert renamed is not None, f"gguf has no name for {name}"
        found[renamed] = tensor
    return found


def connector_tensors(trained: Trained) -> dict[str, Tensor]:
    first, second = projector(trained.model.connector)
    return {
        f"mm.{number}.{part}": getattr(layer, part).detach()
        for number, layer in ((0, first), (2, second))
        for part in ("weight", "bias")
    }
