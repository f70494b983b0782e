"""Which transformers class holds a model exactly; decided by what the parts are, not by their names.

Enters: a `MultimodalLM`, which may be a skeleton on the meta device (then config files alone decided). Leaves: a
`Home`: the stock class, or remote code and why no stock class will do.

Facts of transformers 5.23 behind the rules. Llava: hidden state of any layer before the encoder's final norm, at most
one class token dropped, linear - activation - linear whose hidden width is the LLM's, a head without bias, cap or
scale. VipLlava: the same with a LayerNorm in front. The classes with a pixel shuffle all put a norm between encoder and
connector (Idefics3, SmolVLM, Cohere2Vision and Lfm2Vl read behind the encoder's final norm, AyaVision and InternVL add
a LayerNorm): no connector that reads before the norm can be rewritten for them. BLIP-2's Q-Former comes with an encoder
of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from mllm.models.connectors.pixel_shuffle import Shuffle
from mllm.models.fused_encoder import FusedEncoder
from mllm.models.multimodal import MultimodalLM
from mllm.models.vision_encoder import VisionEncoder

ACTIVATIONS = {"GELU": "gelu", "SiLU": "silu", "ReLU": "relu", "Tanh": "tanh"}
"""torch's module -> the name that transformers' configs use."""


@dataclass(frozen=True)
class Home:
    """Where a model can live."""

    architecture: str
    """The class in transformers; empty where none holds it, and remote code does."""
    why: str
    """One sentence: what makes it fit, or what does not."""

    @property
    def is_stock(self) -> bool:
        return bool(self.architecture)


def find_home(model: MultimodalLM) -> Home:
    """The stock class that holds every part of the model exactly, else remote code."""
    if is_vip_llava(model):
        return Home("VipLlavaForConditionalGeneration", "its connector, with a norm in front, is VipLlava's")
    obstacles = [*connector_obstacles(model), *encoder_obstacles(model), *head_obstacles(model.llm)]
    if obstacles:
        return Home("", "; ".join(obstacles))
    if isinstance(model.connector, nn.Linear):
        way = "as activation(x) - activation(-x) = x" if linear_fits_twice(model.connector) else "with no activation"
        return Home("LlavaForConditionalGeneration", f"a linear connector, written {way} in Llava's two layers")
    return Home("LlavaForConditionalGeneration", "its connector is Llava's")


def connector_obstacles(model: MultimodalLM) -> list[str]:
    """Why Llava's projector cannot be this connector."""
    connector = model.connector
    if isinstance(connector, nn.Linear) or is_llava_projector(connector):
        return []
    if any(isinstance(module, Shuffle) for module in connector.modules()):
        return ["no stock class has a pixel shuffle without a norm between encoder and connector"]
    if isinstance(connector, nn.Sequential) and all(isinstance(m, nn.Linear | nn.GELU) for m in connector):
        return [f"a connector of {sum(isinstance(m, nn.Linear) for m in connector)} linear layers: Llava has two"]
    return [f"no stock class has a {type(connector).__name__} behind any encoder"]


def is_vip_llava(model: MultimodalLM) -> bool:
    """A LayerNorm in front of Llava's connector, and a class token, which VipLlava drops unasked."""
    connector, others = model.connector, [*encoder_obstacles(model), *head_obstacles(model.llm)]
    if others or not isinstance(connector, nn.Sequential) or not isinstance(connector[0], nn.LayerNorm):
        return False
    assert isinstance(model.vision_encoder, VisionEncoder)
    return is_llava_projector(connector[1:]) and model.vision_encoder.num_prefix_tokens == 1


def is_llava_projector(connector: nn.Module) -> bool:
    """Linear, activation, linear, and the hidden width is the LLM's."""
    if not isinstance(connector, nn.Sequential) or len(connector) != 3:
        return False
    first, activation, second = connector
    return (
        isinstance(first, nn.Linear)
        and isinstance(second, nn.Linear)
        and type(activation).__name__ in ACTIVATIONS
        and getattr(activation, "approximate", "none") == "none"
        and first.out_features == second.in_features == second.out_features
        and first.bias is not None
        and second.bias is not None
    )


def linear_fits_twice(connector: nn.Linear) -> bool:
    """Is there room in a hidden layer of the LLM's width for every input and its negative?"""
    return 2 * connector.in_features <= connector.out_features


def encoder_obstacles(model: MultimodalLM) -> list[str]:
    """What stock Llava cannot do with an encoder."""
    encoder = model.vision_encoder
    if isinstance(encoder, FusedEncoder):
        return [f"{len(encoder.encoders)} encoders: no stock class has more than one"]
    found = []
    if encoder.num_prefix_tokens > 1:
        found.append(f"{encoder.num_prefix_tokens} class and register tokens: Llava drops one at most")
    if encoder.model.config.model_type == "siglip2_vision_model":
        found.append("SigLIP2 NaFlex takes patches and the shape of their grid: Llava hands it neither")
    return found


def head_obstacles(llm: Any) -> list[str]:
    """What stands between the last hidden state and the logits beside one matrix."""
    config = llm.config
    found = [
        f"the LLM's {name} is {value}: Llava's head has none"
        for name, plain in (("final_logit_softcapping", None), ("logit_scale", None), ("logits_scaling", 1.0))
        if (value := getattr(config, name, None)) not in (None, plain)
    ]
    if config.model_type in ("gemma", "gemma2"):
        found.append("transformers 4.57 scales a Gemma's visual tokens as words, 5 does not")
    if getattr(llm.get_output_embeddings(), "bias", None) is not None:
        found.append("the LLM's head has a bias: Llava's has none")
    return found
