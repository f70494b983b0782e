"""The model as stock Llava, LlavaNext or VipLlava (`...ForConditionalGeneration`): config and tensors.

Enters: a `Trained` whose home is Llava. Leaves: `config.json` as a dictionary, and tensors by name, float32. Names
are those of every published Llava: `vision_tower.vision_model.*`, `multi_modal_projector.linear_{1,2}.*`,
`language_model.model.*`, `language_model.lm_head.weight`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mllm.export.homes import ACTIVATIONS, linear_fits_twice
from mllm.export.layout import decoder_of, is_tied, published_names, text_config, vision_config
from mllm.export.trained import Trained


def config(trained: Trained) -> dict[str, Any]:
    """What goes into `config.json`."""
    model = trained.model
    common = {
        "image_token_index": model.image_token_id,
        "image_seq_length": trained.processor.num_visual_tokens,
        "projector_hidden_act": activation(model.connector),
        "tie_word_embeddings": is_tied(model.llm),
        "vision_config": vision_config(trained.encoder.model),
        "text_config": text_config(model.llm, vocabulary_rows(trained)),
    }
    if (norm := norm_in_front(model.connector)) is not None:
        kind = {"architectures": ["VipLlavaForConditionalGeneration"], "model_type": "vipllava"}
        return {
            **kind,
            "vision_feature_layers": trained.parts.feature_layer,
            "projector_layernorm_eps": norm.eps,
        } | common
    kind = {"architectures": ["LlavaForConditionalGeneration"], "model_type": "llava"}
    if (layout := trained.processor.slots.any_resolution) is not None:
        kind = {"architectures": ["LlavaNextForConditionalGeneration"], "model_type": "llava_next"}
        common["image_grid_pinpoints"] = layout.pinpoints()
    return {
        **kind,
        "multimodal_projector_bias": True,
        "vision_feature_layer": trained.parts.feature_layer,
        "vision_feature_select_strategy": select_strategy(trained),
        **common,
    }


def norm_in_front(connector: nn.Module) -> nn.LayerNorm | None:
    """VipLlava's."""
    first = connector[0] if isinstance(connector, nn.Sequential) else None
    return first if isinstance(first, nn.LayerNorm) else None


def select_strategy(trained: Trained) -> str:
    """`default` drops a class token, `full` keeps all there is."""
    return "default" if trained.encoder.num_prefix_tokens else "full"


def tensors(trained: Trained) -> dict[str, Tensor]:
    """Every weight of the exported model."""
    first, second = projector(trained.model.connector)
    named = {
        f"multi_modal_projector.linear_{number}.{part}": getattr(layer, part).detach()
        for number, layer in ((1, first), (2, second))
        for part in ("weight", "bias")
    }
    if (norm := norm_in_front(trained.model.connector)) is not None:
        named |= {
            f"multi_modal_projector.projector_layernorm.{name}": p.detach() for name, p in norm.named_parameters()
        }
    if trained.model.image_newline is not None:
        named["image_newline"] = trained.model.image_newline.weight.detach()
    return {**vision_tensors(trained), **named, **language_tensors(trained, "language_model.model.")}


def vision_settings(trained: Trained) -> dict[str, Any]:
    """The encoder's config; read behind its norm, it ends at the tap, since those classes read the last layer."""
    ends = {"num_hidden_layers": max(trained.encoder.taps) + 1} if trained.encoder.feature_norm else {}
    return vision_config(trained.encoder.model) | ends


def vision_tensors(trained: Trained, prefix: str = "vision_tower.") -> dict[str, Tensor]:
    """The encoder, without SigLIP's pooling head (nobody reads it); whole, unless it ends at the tap."""
    found = published_names(trained.encoder.model if trained.encoder.feature_norm else trained.vision_model())
    return {f"{prefix}{name}": tensor for name, tensor in found.items() if not name.startswith("vision_model.head")}


def language_tensors(trained: Trained, prefix: str, head: str = "language_model.lm_head.weight") -> dict[str, Tensor]:
    """The decoder under `prefix`, and the head where it is not the embeddings themselves; both have a row for the
    image's token."""
    llm, rows = trained.model.llm, vocabulary_rows(trained)
    embeddings = llm.get_input_embeddings().weight
    decoder = decoder_of(llm)
    (own,) = [name for name, parameter in decoder.named_parameters() if parameter is embeddings]
    found = {f"{prefix}{name}": tensor for name, tensor in published_names(decoder).items()}
    found[prefix + own] = extended(embeddings.detach(), rows)
    if not is_tied(llm):
        found[head] = extended(llm.get_output_embeddings().weight.detach(), rows)
    return found


def vocabulary_rows(trained: Trained) -> int:
    """Rows of the embedding table: transformers looks the placeholder up before it overwrites what it found."""
    have = trained.model.llm.get_input_embeddings().num_embeddings
    return max(have, trained.model.image_token_id + 1)


def extended(table: Tensor, rows: int) -> Tensor:
    """[have, D] -> [rows, D]: new rows are the mean of the others, so that a new token's logit is the mean logit and
    greedy decoding never picks it."""
    mean = table.mean(0, keepdim=True).expand(rows - len(table), -1)
    return torch.cat([table, mean]) if rows > len(table) else table


def activation(connector: Any) -> str:
    """What transformers calls the function between Llava's two layers."""
    if isinstance(connector, nn.Linear):
        return "gelu" if linear_fits_twice(connector) else "linear"
    return ACTIVATIONS[type(connector[-2]).__name__]


def projector(connector: Any) -> tuple[nn.Linear, nn.Linear]:
    """Llava's two layers; exact also for a single linear one."""
    if not isinstance(connector, nn.Linear):
        return connector[-3], connector[-1]
    width_in, width = connector.in_features, connector.out_features
    first, second = nn.Linear(width_in, width), nn.Linear(width, width)
    with torch.no_grad():
        for layer in (first, second):
            layer.weight.zero_()
            layer.bias.zero_()
        if connector.bias is not None:
            second.bias.copy_(connector.bias)
        if linear_fits_twice(connector):  # gelu(x) - gelu(-x) = x, for each of the inputs
            first.weight[: 2 * width_in].copy_(torch.cat([torch.eye(width_in), -torch.eye(width_in)]))
            second.weight[:, : 2 * width_in].copy_(torch.cat([connector.weight, -connector.weight], dim=1))
        else:
            first.weight.copy_(connector.weight)
            second.weight.copy_(torch.eye(width))
    return first, second
