"""The model as stock `Cohere2VisionForConditionalGeneration` or `AyaVisionForConditionalGeneration`.

Enters: a `Trained` whose home is one of them. Leaves: `config.json` as a dictionary, and tensors by name.

Both join neighbouring patches, then have a linear layer of two halves, the second of which gates the first, and a
linear layer to the LLM's width (`swiglu` here). One matrix is that too: its gate always stands open at `OPEN`, and the
second layer divides by as much. Nothing is rounded, except a mean over 9 or 36 patches, in float32's last digit.

D width of the LLM, J = factor^2 * Dv width of joined patches, T terms of a divisor.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mllm.export.blocks import Blocks, find_blocks
from mllm.export.layout import is_tied, text_config
from mllm.export.llava import language_tensors, select_strategy, vision_settings, vision_tensors, vocabulary_rows
from mllm.export.trained import Trained

OPEN = 32.0
"""SiLU of it is itself in every floating-point format, and it is a power of two: nothing is rounded."""


def blocks(trained: Trained) -> Blocks:
    found = find_blocks(trained.model.connector, trained.encoder.num_patches)
    assert found is not None, "the home was decided by it"
    return found


def config(trained: Trained) -> dict[str, Any]:
    """What goes into `config.json`."""
    model, connector = trained.model, blocks(trained)
    common = {
        "downsample_factor": connector.factor,
        "alignment_intermediate_size": len(projector(connector)["linear_1.bias"]),
        "tie_word_embeddings": is_tied(model.llm),
        "vision_config": vision_settings(trained),
        "text_config": text_config(model.llm, vocabulary_rows(trained)),
    }
    if connector.norm is None:
        return {
            "architectures": ["Cohere2VisionForConditionalGeneration"],
            "model_type": "cohere2_vision",
            "image_token_id": model.image_token_id,
            **common,
        }
    return {
        "architectures": ["AyaVisionForConditionalGeneration"],
        "model_type": "aya_vision",
        "image_token_index": model.image_token_id,
        "vision_feature_layer": trained.parts.feature_layer,
        "vision_feature_select_strategy": select_strategy(trained),
        "adapter_layer_norm_eps": connector.norm.eps,
        **common,
    }


def tensors(trained: Trained) -> dict[str, Tensor]:
    """Every weight of the exported model."""
    named = {f"model.multi_modal_projector.{name}": tensor for name, tensor in projector(blocks(trained)).items()}
    language = language_tensors(trained, "model.language_model.", "lm_head.weight")
    return {**vision_tensors(trained, "model.vision_tower."), **named, **language}


def projector(connector: Blocks) -> dict[str, Tensor]:
    """The two layers, and the norm where there is one."""
    norm = connector.norm.named_parameters() if connector.norm else ()
    found = {f"layernorm.{name}": parameter.detach() for name, parameter in norm}
    first, last = connector.layers[0], connector.layers[-1]
    if connector.is_gated:
        layers = [
            (f"linear_{number}.{name}", p) for number, x in ((1, first), (2, last)) for name, p in x.named_parameters()
        ]
        return {**found, **{name: parameter.detach() for name, parameter in layers}}
    matrix, bias = first.weight.detach(), first.bias.detach()  # [D, J] or [D, Dv], [D]
    patches = connector.factor**2 if connector.is_pooled else 1
    matrix, eye = matrix.repeat(1, patches), torch.eye(len(bias), dtype=bias.dtype)  # [D, J], [D, D]
    # the sum over a block, divided at the end; a divisor that no short number holds is cut in terms
    parts = terms(1 / (OPEN * patches))
    values, width = torch.cat([matrix] * len(parts)), len(bias) * len(parts)  # [T * D, J]
    return {
        **found,
        "linear_1.weight": torch.cat([values, torch.zeros_like(values)]),  # [2 * T * D, J]
        "linear_1.bias": torch.cat([torch.zeros(width), torch.full((width,), OPEN)]).to(bias.dtype),
        "linear_2.weight": torch.cat([eye * part for part in parts], dim=1),  # [D, T * D]
        "linear_2.bias": bias,
    }


def terms(number: float) -> list[float]:
    """Numbers that bfloat16 holds and that add up to `number` in float32: one of a power of two, else three."""
    found: list[float] = []
    while abs(left := number - sum(found)) > 2**-24 * number:
        found.append(torch.tensor(left, dtype=torch.bfloat16).item())
    return found
