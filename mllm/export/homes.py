"""Which transformers class holds a model exactly; decided by what the parts are, not by their names.

Enters: a `MultimodalLM`, which may be a skeleton on the meta device (then config files alone decided). Leaves: a
`Home`: the stock class, or remote code and why no stock class will do.

Facts of transformers 5.23 behind the rules. Llava: hidden state of any layer before the encoder's final norm, at most
one class token dropped, linear - activation - linear whose hidden width is the LLM's, a head without bias, cap or
scale. VipLlava: the same with a LayerNorm in front. DeepseekVL: Llava's connector behind the encoder's final norm, no
token dropped. Every class with a pixel shuffle has a norm somewhere: Cohere2Vision reads behind the encoder's,
AyaVision and InternVL add one over the joined patches. So a pixel shuffle without any is nobody's. LlavaNext: Llava
over tiles of the size in the encoder's config, laid out at any resolution with a newline.

Not used, since another holds the same. Idefics3 and SmolVLM (a pixel shuffle and one matrix behind the norm, which
Cohere2Vision is as well): they find the position of a patch by comparing fractions, which shifts it by one under 4.57.6
for every grid, and under 5.23 for some (19, 25, 29, 31 a side); and their processor puts marks around an image that no
prompt was trained with. InternVL and BLIP-2's Q-Former come with encoders of their own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from mllm.export.blocks import Blocks, find_blocks
from mllm.models.connectors.avg_pool import Pool
from mllm.models.connectors.pixel_shuffle import Shuffle
from mllm.models.fused_encoder import FusedEncoder
from mllm.models.multimodal import MultimodalLM

LLAVA, VIP_LLAVA = "LlavaForConditionalGeneration", "VipLlavaForConditionalGeneration"
LLAVA_NEXT = "LlavaNextForConditionalGeneration"
DEEPSEEK_VL = "DeepseekVLForConditionalGeneration"
COHERE2_VISION, AYA_VISION = "Cohere2VisionForConditionalGeneration", "AyaVisionForConditionalGeneration"
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
    obstacles = [*connector_obstacles(model), *encoder_obstacles(model), *head_obstacles(model.llm)]
    obstacles += tile_obstacles(model)
    if obstacles:
        return Home("", "; ".join(obstacles))
    if model.image_newline is not None:
        return Home(LLAVA_NEXT, "its tiles, its newline and its connector are LlavaNext's")
    connector, behind = model.connector, model.vision_encoder.feature_norm
    if isinstance(connector, nn.Linear) and not behind:
        way = "as activation(x) - activation(-x) = x" if linear_fits_twice(connector) else "with no activation"
        return Home(LLAVA, f"a linear connector, written {way} in Llava's two layers")
    if is_vip_projector(connector):
        return Home(VIP_LLAVA, "its connector, with a norm in front, is VipLlava's")
    if is_llava_projector(connector):
        tap = "read behind the encoder's final norm, is DeepseekVL's" if behind else "is Llava's"
        return Home(DEEPSEEK_VL if behind else LLAVA, f"its connector{',' if behind else ''} {tap}")
    found = blocks(model)
    assert found is not None
    how = "is" if found.is_gated else "is, written with a gate that stands open,"
    if found.norm:
        return Home(AYA_VISION, f"its connector, a pixel shuffle with a norm behind it, {how} AyaVision's")
    return Home(COHERE2_VISION, f"its connector, read behind the encoder's final norm, {how} Cohere2Vision's")


def blocks(model: MultimodalLM) -> Blocks | None:
    return find_blocks(model.connector, model.vision_encoder.num_patches)


def connector_obstacles(model: MultimodalLM) -> list[str]:
    """Why no stock projector that reads where this one does can be this connector."""
    connector: Any = model.connector
    behind = model.vision_encoder.feature_norm
    where = f"{'behind' if behind else 'before'} the encoder's final norm"
    if isinstance(connector, nn.Linear):
        return []
    if is_llava_projector(connector):
        is_gelu = isinstance(connector[1], nn.GELU)
        return [] if is_gelu or not behind else ["DeepseekVL, which reads behind the norm, has GELU"]
    if is_vip_projector(connector):
        if behind:
            return [f"no stock class has a norm and two linear layers {where}"]
        dropped = getattr(model.vision_encoder, "num_prefix_tokens", 1)
        return [] if dropped else ["VipLlava drops the first token, here a patch: a norm in front needs a class token"]
    if (found := blocks(model)) and bool(found.norm) != behind:
        return []
    if not isinstance(connector, nn.Sequential):
        return [f"no stock class has a {type(connector).__name__} behind any encoder"]
    return [f"no stock class has {described(connector)} {where}"]


def described(modules: nn.Sequential) -> str:
    """A stack of layers in a few words."""
    depth = sum(isinstance(module, nn.Linear) for module in modules)
    layers = "one linear layer" if depth == 1 else f"{depth} linear layers"
    norm = "a norm and " if any(isinstance(module, nn.LayerNorm) for module in modules) else ""
    for kind, name in ((Shuffle, "a pixel shuffle"), (Pool, "an average pooling")):
        if any(isinstance(module, kind) for module in modules):
            return f"{name} with {norm}{layers}"
    return f"{norm}{layers}"


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


def has_blocks(connector: nn.Module) -> bool:
    """Does a visual token stand for a block of patches?"""
    return isinstance(connector, nn.Sequential) and isinstance(connector[0], Shuffle | Pool)


def is_vip_projector(connector: nn.Module) -> bool:
    """A LayerNorm in front of Llava's projector."""
    return (
        isinstance(connector, nn.Sequential)
        and isinstance(connector[0], nn.LayerNorm)
        and is_llava_projector(connector[1:])
    )


def is_two_layers(connector: nn.Module) -> bool:
    """Llava's connector, or the linear one that it can be."""
    return isinstance(connector, nn.Linear) or is_llava_projector(connector)


def linear_fits_twice(connector: nn.Linear) -> bool:
    """Is there room in a hidden layer of the LLM's width for every input and its negative?"""
    return 2 * connector.in_features <= connector.out_features


def encoder_obstacles(model: MultimodalLM) -> list[str]:
    """What stock Llava cannot do with an encoder."""
    encoder = model.vision_encoder
    if isinstance(encoder, FusedEncoder):
        return [f"{len(encoder.encoders)} encoders: no stock class has more than one"]
    found, prefix = [], encoder.num_prefix_tokens
    if encoder.feature_norm and prefix:
        found.append("a class token: the classes that read behind the encoder's final norm drop none (SigLIP has none)")
    elif prefix > 1:
        found.append(f"{prefix} class and register tokens: Llava drops one at most")
    if len(encoder.taps) > 1 and (encoder.feature_norm or has_blocks(model.connector)):
        found.append("features of several layers: of the stock classes Llava and VipLlava alone read them")
    if encoder.model.config.model_type == "siglip2_vision_model":
        found.append("SigLIP2 NaFlex takes patches and the shape of their grid: Llava hands it neither")
    return found


def tile_obstacles(model: MultimodalLM) -> list[str]:
    """What LlavaNext cannot do, beside what Llava cannot, where tiles are laid out at any resolution."""
    if model.image_newline is None:
        return []
    encoder, found = model.vision_encoder, []
    if not is_two_layers(model.connector) or encoder.feature_norm:
        found.append(
            "LlavaNext, whose tiles and newline these are, has Llava's connector before the encoder's final norm"
        )
    own = getattr(getattr(encoder.model, "config", None), "image_size", None)
    if own not in (None, encoder.grid.side):
        found.append(f"LlavaNext cuts tiles of the encoder's image_size, {own}, which is run at {encoder.grid.side}")
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
