"""Everything the tests build on, made in code: a tokenizer, tiny encoders and LLMs of the real classes, pictures.

CPU, float32, seeded, offline. Widths are a few dozen, layers are two: what is tested is arithmetic, not quality.
"""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    Phi3Config,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
)

from mllm.data.processor import Processor
from mllm.models.connectors import MLPConnector
from mllm.models.multimodal import MultimodalLM
from mllm.models.vision_encoder import VisionEncoder
from mllm.types import Mark, Message, Normalisation, Sample

IMAGE_SIZE, PATCH, VISUAL_TOKENS = 28, 14, 4
ENDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
TINY_LLM = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    **ENDS,
}
CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
WINDOW = 6
"""Tokens that a sliding window sees: far fewer than a row of the tests has."""
SLIDING = {"use_sliding_window": True, "sliding_window": WINDOW}
GEMMA = {"sliding_window": WINDOW, "query_pre_attn_scalar": 8, "layer_types": ["sliding_attention", "full_attention"]}
LLM_CONFIGS = {
    "llama": (LlamaConfig, {}),
    "qwen2": (Qwen2Config, {}),
    "qwen2_sliding": (Qwen2Config, {**SLIDING, "max_window_layers": 1}),
    "qwen3": (Qwen3Config, {}),
    "mistral": (MistralConfig, {"sliding_window": WINDOW}),
    "gemma": (GemmaConfig, {}),
    "gemma2": (Gemma2Config, {**GEMMA, "attn_logit_softcapping": 0.5, "final_logit_softcapping": 0.05}),
    "gemma3": (Gemma3TextConfig, GEMMA),
    "phi3": (Phi3Config, {"sliding_window": WINDOW}),
    "smollm3": (SmolLM3Config, {**SLIDING, "no_rope_layers": [1, 0]}),
    "olmo2": (Olmo2Config, {}),
    "gpt_neox": (GPTNeoXConfig, {"num_key_value_heads": 4}),
}
"""By family: its class, and what makes it different from Llama."""

torch.set_num_threads(1)


def make_tokenizer(chat_template: str | None = CHAT_TEMPLATE) -> PreTrainedTokenizerFast:
    """A byte-level BPE: any text, round trip exact."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<pad>", "<s>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(["what colour is the circle? red green blue", "a large square"] * 20, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="<|end|>",
        additional_special_tokens=special[3:],
    )
    fast.chat_template = chat_template
    fast.name_or_path = "tests' tokenizer"
    return fast


def make_llm(family: str = "llama", attention: str = "sdpa", seed: int = 0, **overrides: object) -> torch.nn.Module:
    """A random causal LLM of a stock class: two layers, width 32, grouped key-value heads."""
    torch.manual_seed(seed)
    kind, own = LLM_CONFIGS[family]
    config = kind(**{"vocab_size": 384, **TINY_LLM, **own, **overrides})
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention)


def make_clip(seed: int = 0) -> CLIPModel:
    """A random CLIP: 28-pixel images in four patches, three layers."""
    torch.manual_seed(seed)
    half = {"hidden_size": 24, "intermediate_size": 48, "num_attention_heads": 2}
    return CLIPModel(
        CLIPConfig(
            vision_config={**half, "num_hidden_layers": 3, "image_size": IMAGE_SIZE, "patch_size": PATCH},
            text_config={**half, "num_hidden_layers": 1, "vocab_size": 384, "max_position_embeddings": 32, **ENDS},
            projection_dim=16,
        )
    )


def make_image_processor() -> CLIPImageProcessor:
    side = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    return CLIPImageProcessor(size={"shortest_edge": IMAGE_SIZE}, crop_size=side)


def make_processor(
    visual_tokens: int = VISUAL_TOKENS, chat_template: str | None = CHAT_TEMPLATE, **settings: Any
) -> Processor:
    return Processor(make_tokenizer(chat_template), make_image_processor(), visual_tokens, **settings)


def make_model(
    family: str = "llama", attention: str = "sdpa", connector: object | None = None, seed: int = 0, **llm: object
) -> MultimodalLM:
    """All three parts, nothing frozen."""
    encoder = VisionEncoder(make_clip(seed).vision_model, normalisation=Normalisation.of(make_image_processor()))
    torch.manual_seed(seed + 1)
    bridge = (connector or MLPConnector()).build(encoder.width, 32, encoder.num_patches)
    image_token_id = make_processor().image_token_id
    return MultimodalLM(encoder, bridge, make_llm(family, attention, seed, **llm), image_token_id)


def picture(seed: int, size: tuple[int, int] = (32, 32)) -> Image.Image:
    """Noise: every seed another picture."""
    noise = torch.randint(0, 256, (size[1], size[0], 3), generator=torch.Generator().manual_seed(seed))
    return Image.fromarray(noise.to(torch.uint8).numpy())


def make_sample(seed: int = 0, num_images: int = 1, turns: int = 1, extra: str = "") -> Sample:
    """A conversation about noise."""
    messages = []
    for turn in range(turns):
        marks = [Mark.IMAGE] * (num_images if turn == 0 else 0)
        messages.append(Message("user", [*marks, f"what is number {seed} {turn}? {extra}"]))
        messages.append(Message("assistant", [f"answer {seed * 7 + turn} {extra}"]))
    images = [picture(100 * seed + i) for i in range(num_images)]
    return Sample(f"sample-{seed}", messages, images, where=f"made.json, row {seed}")


def pytest_collection_finish() -> None:
    """What is imported by now stays: half a million objects that no later collection has to walk through, in this
    process (0.3 s each time) or in one forked from it (which would copy every page of them)."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What runs keep for later runs stays out of the home, also of scripts that are started."""
    os.environ["MLLM_CACHE"] = str(tmp_path_factory.mktemp("cache"))


def forget_accelerate() -> None:
    """Accelerate remembers for the whole process how it was first asked."""
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture
def alone() -> Iterator[None]:
    """Tests that follow may ask Accelerate for something else."""
    yield
    forget_accelerate()


def run_mllm(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> Any:
    """A command of `mllm` in this process: 0, its exit code, or its one line of error."""
    from mllm import cli

    monkeypatch.setattr(sys, "argv", ["mllm", *map(str, arguments)])
    try:
        cli.main()
        return 0
    except SystemExit as ended:
        return ended.code


@pytest.fixture(scope="session")
def processor() -> Processor:
    return make_processor()


@pytest.fixture(scope="session")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`encoder/` and `llm/` in Hub format: what real checkpoints look like, at tiny sizes."""
    folder = tmp_path_factory.mktemp("hub")
    parts = make_processor()
    make_clip().save_pretrained(folder / "encoder")
    parts.image_processor.save_pretrained(folder / "encoder")
    make_llm().save_pretrained(folder / "llm")
    make_tokenizer().save_pretrained(folder / "llm")
    return folder


@pytest.fixture
def llava_folder(tmp_path: Path) -> Callable[..., Path]:
    """Write a LLaVA-JSON file with pictures; returns the JSON's path."""
    return lambda records=12, **changes: write_llava(tmp_path, records, **changes)


def write_llava(folder: Path, records: int = 12, turns: int = 2) -> Path:
    """`records` conversations, each about a picture of its own."""
    import json

    (folder / "images").mkdir(parents=True, exist_ok=True)
    written = []
    for row in range(records):
        picture(row).save(folder / "images" / f"{row}.png")
        conversations = []
        for turn in range(turns):
            conversations.append(
                {"from": "human", "value": ("<image>\n" if turn == 0 else "") + f"what is {row} {turn}?"}
            )
            conversations.append({"from": "gpt", "value": f"it is {row + turn}"})
        written.append({"id": f"r{row}", "image": f"images/{row}.png", "conversations": conversations})
    (folder / "data.json").write_text(json.dumps(written))
    return folder / "data.json"
