"""What a model will be, and who will be able to load it: said before anything is trained.

Enters: a YAML of a run, a stage folder or its Hub id. Leaves: the parts and how many parameters of them train, visual
tokens of an image, and for transformers, vLLM, SGLang and llama.cpp whether each can load this encoder, connector and
LLM together, with the reason. Config files alone answer: all weights are on the meta device.

What the servers take was read in the sources of the versions named here; vLLM and SGLang were not run.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from mllm.config import RunConfig, load_config, stage_run
from mllm.data.imaging.tiling import Tiling
from mllm.export.gguf import llm, vision
from mllm.export.homes import AYA_VISION, COHERE2_VISION, LLAVA, LLAVA_NEXT, Home, find_home
from mllm.export.llava import activation
from mllm.generate import find_folder
from mllm.models.build import build_model, check_aspect, check_rows, vision_grids, visual_tokens_per_image
from mllm.models.fused_encoder import FusedEncoder
from mllm.models.multimodal import MultimodalLM
from mllm.models.vision_encoder import VisionEncoder
from mllm.native_aspect import NativeAspect
from mllm.prospect import NOTHING, prospect, without_adapters
from mllm.train.trainable import choose_trainable, parts

VERSIONS = {"vLLM": "0.33.0", "SGLang": "0.5.23", "llama.cpp": "0c1e570 (2026-10-01)"}
VLLM_ENCODERS = ("clip_vision_model", "siglip_vision_model")
"""Of vLLM's own Llava class; Pixtral is the third."""


@dataclass(frozen=True)
class Loader:
    """One program and its answer."""

    loader: str
    version: str
    loads: bool
    why: str
    """How, where it loads; why not, where it does not."""


@dataclass(frozen=True)
class Info:
    """Everything that `mllm info` says."""

    model: str
    parts: list[dict[str, Any]]
    visual_tokens_per_image: int
    """Of one tile, where images are cut into tiles."""
    visual_tokens_range: tuple[int, int]
    """The fewest and the most that an image becomes."""
    exports_as: str
    """The transformers class, `remote code` where no stock class holds the model, `nothing` where the way its pictures
    or prompts are prepared has no home."""
    loaders: list[Loader]
    instead: str = ""
    """Settings that would make it a stock class, where it is none."""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def info(name: str) -> Info:
    """Ask the configs.

    Raises:
        ValueError: no such config or model, or parts that do not fit together.
    """
    config = read(name)
    model = skeleton(config)
    home = find_home(model)
    named = {"vision_encoder": " + ".join(config.parts().encoders()), "llm": config.parts().llm}
    named["image_newline"] = "one vector behind each row of tiles"
    described = [
        {
            "part": part.name,
            "is": named.get(part.name, config.parts().connector.type),
            "parameters": part.trained + part.frozen,
            "trained": part.trained,
        }
        for part in parts(model, config.train.learning_rate)
    ]
    tokens = visual_tokens_per_image(config.parts())
    answers, found = loaders(model, home), prospect(config, model)
    if found.exports_as == NOTHING:
        answers = [replace(answer, loads=False, why=found.why) for answer in answers]
    return Info(name, described, tokens, token_range(config, tokens), found.exports_as, answers, found.instead)


def token_range(config: RunConfig, tokens: int) -> tuple[int, int]:
    """The fewest and the most visual tokens of an image, of a tile being `tokens`."""
    tiling = tiling_of(config)
    if config.data.image_fit == "aspect":
        check_aspect(config.parts())
        grid = vision_grids(config.parts())[0]
        return NativeAspect(grid.side, grid.patch).range()
    if tiling is None:
        return tokens, tokens
    layout, (fewest, most) = tiling.any_resolution(tokens), tiling.range()
    return layout.range() if layout else (fewest * tokens, most * tokens)


def tiling_of(config: RunConfig) -> Tiling | None:
    """As the processor would have it."""
    data = config.data
    if data.tiles == "none":
        return None
    return Tiling(data.tiles, vision_grids(config.parts())[0].side, data.max_tiles)


def read(name: str) -> RunConfig:
    """A YAML file, or the config of a stage."""
    if Path(name).suffix in (".yaml", ".yml"):
        return load_config(Path(name))
    return stage_run(find_folder(name))


def skeleton(config: RunConfig) -> MultimodalLM:
    """The model without its weights, what trains switched on."""
    parts = replace(config.parts(), random_weights=True, quantisation=None)
    tiling = tiling_of(config)
    layout = tiling.any_resolution(visual_tokens_per_image(parts)) if tiling else None
    if layout:
        check_rows(parts)
    with torch.device("meta"):
        model = build_model(parts, image_token_id=0, layout=layout)
        train = config.train
        choose_trainable(model, train.learning_rate, train.lora, train.vision_lora)
    return model


def loaders(model: MultimodalLM, home: Home) -> list[Loader]:
    """Everyone's answer."""
    import transformers

    merged = without_adapters(model)
    return [
        Loader("transformers", f"4.57 and {transformers.__version__}", True, in_transformers(home)),
        Loader("vLLM", VERSIONS["vLLM"], *in_vllm(merged, home)),
        Loader("SGLang", VERSIONS["SGLang"], *in_sglang(merged, home)),
        Loader("llama.cpp", VERSIONS["llama.cpp"], *in_llama_cpp(merged)),
    ]


def in_transformers(home: Home) -> str:
    if home.is_stock:
        return f"as {home.architecture}, without remote code ({home.why})"
    return f"as remote code, trust_remote_code=True ({home.why})"


def in_vllm(model: MultimodalLM, home: Home) -> tuple[bool, str]:
    if sees_bytes(model):
        return False, "its image pipeline hands over normalised pixels, these encoders each want their own"
    if not home.is_stock:
        return True, "through its Transformers backend: --model-impl transformers --trust-remote-code"
    if home.architecture in (COHERE2_VISION, AYA_VISION):
        return True, "--model-impl transformers (its own class of that name writes marks around an image)"
    if home.architecture not in (LLAVA, LLAVA_NEXT):
        return True, "through its Transformers backend, by itself"
    own, reasons = home.architecture.removesuffix("ForConditionalGeneration"), []
    if (kind := model.vision_encoder.model.config.model_type) not in VLLM_ENCODERS:
        reasons.append(f"its own {own} takes no {kind}")
    if own == "Llava" and isinstance(model.vision_encoder, VisionEncoder) and len(model.vision_encoder.taps) > 1:
        reasons.append("its own Llava reads one layer")
    if activation(model.connector) == "linear":
        reasons.append(f"its own {own} knows no activation 'linear'")
    return True, f"--model-impl transformers ({'; '.join(reasons)})" if reasons else f"with its own {own} class"


def in_sglang(model: MultimodalLM, home: Home) -> tuple[bool, str]:
    if sees_bytes(model):
        return in_vllm(model, home)
    if not home.is_stock:
        return True, "through its Transformers backend: --model-impl transformers --trust-remote-code"
    if home.architecture in (COHERE2_VISION, AYA_VISION):
        return True, "through its Transformers backend: --model-impl transformers"
    if home.architecture != LLAVA:
        return True, "through its Transformers backend, by itself"
    return True, "--model-impl transformers (its own Llava class takes Pixtral encoders only)"


def in_llama_cpp(model: MultimodalLM) -> tuple[bool, str]:
    if found := [*llm.obstacles(model.llm), *vision.obstacles(model)]:
        return False, "; ".join(found)
    return True, "mllm export --to gguf, if it knows how the tokenizer splits words"


def sees_bytes(model: MultimodalLM) -> bool:
    return isinstance(model.vision_encoder, FusedEncoder) and not model.vision_encoder.alike
