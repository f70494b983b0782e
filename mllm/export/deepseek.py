"""The model as stock `DeepseekVLForConditionalGeneration`: Llava's connector behind the encoder's final norm.

Enters: a `Trained` whose home it is. Leaves: `config.json` as a dictionary, and tensors by name.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from mllm.export.layout import is_tied, text_config
from mllm.export.llava import language_tensors, vision_settings, vision_tensors, vocabulary_rows
from mllm.export.trained import Trained


def config(trained: Trained) -> dict[str, Any]:
    """What goes into `config.json`."""
    model = trained.model
    return {
        "architectures": ["DeepseekVLForConditionalGeneration"],
        "model_type": "deepseek_vl",
        "image_token_id": model.image_token_id,
        "tie_word_embeddings": is_tied(model.llm),
        "vision_config": vision_settings(trained),
        "text_config": text_config(model.llm, vocabulary_rows(trained)),
    }


def tensors(trained: Trained) -> dict[str, Tensor]:
    """Every weight of the exported model."""
    connector: Any = trained.model.connector
    named = {
        f"model.aligner.linear{number}.{name}": parameter.detach()
        for number, layer in ((1, connector[0]), (2, connector[2]))
        for name, parameter in layer.named_parameters()
    }
    language = language_tensors(trained, "model.language_model.", "lm_head.weight")
    return {**vision_tensors(trained, "model.vision_model."), **named, **language}
