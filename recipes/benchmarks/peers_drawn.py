"""What all peers train: one tiny multimodal LLM and conversations about pictures, drawn here, the same everywhere.

Enters: a folder, how many samples. Leaves: in it `data.json` with `images/` (LLaVA's layout); `start/`, a finished
stage of ours with weights drawn at random; and `llava/`, our export of that stage: a stock Llava with its processor,
from which the peers start with the same weights.

Lengths are those of the SFT mix (`mixes.py`, instruct) divided by nine: a picture is 64 tokens instead of 576, a row
456 instead of 4096. The LLM is as much narrower, so that attention and head have about the share of the work that they
have in a model of 1.5B.
"""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from benchmarks.mixes import mix
from mllm.assembly import build_processor
from mllm.config import RunConfig, dump_config, load_config, validate
from mllm.data.index import build_index
from mllm.export.trained import load
from mllm.export.transformers_folder import write_files
from mllm.models.build import build_model
from mllm.train.route import make_plan
from mllm.train.stage_folder import save_stage

SIDE, PATCH = 112, 14
SCALE = 9
"""Real lengths are this many times as long."""
VISUAL_TOKENS = (SIDE // PATCH) ** 2
PICTURE = VISUAL_TOKENS * SCALE
"""Tokens of a picture in the mix."""
SEQ_LENGTH = -(-4096 // SCALE // 8) * 8
ROWS, ACCUMULATION = 3, 2
"""Rows of a micro-batch, about 16 samples: the batch of LLaVA-1.5 on one GPU. Two of them are a step."""
FEWEST_WORDS = 2
"""Of a turn."""
RATE, MAX_GRAD_NORM = 3e-4, 1.0
"""AdamW, constant, no decay."""
VOCABULARY = 4096
SPECIAL = ["<|pad|>", "<|unknown|>", "<|im_start|>", "<|im_end|>", "<image>"]
ROLES = ["user", "assistant"]
WORDS = VOCABULARY - len(SPECIAL) - len(ROLES)
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ message['content'] }}<|im_end|>{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""ChatML, with the marks by which transformers knows what the assistant says; ours needs none."""
AROUND_TURNS = 6
"""Tokens that the template puts around a question and its answer."""
LLM = {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 6, "num_attention_heads": 4}
ENCODER = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 2}


def draw(folder: Path, samples: int, seed: int = 0, **llm: int) -> None:
    """Write everything; `llm` changes the LLM's shape."""
    draw_conversations(folder, samples, seed)
    draw_parts(folder, seed, {**LLM, **llm})
    draw_stage(folder, seed)


def draw_conversations(folder: Path, samples: int, seed: int) -> None:
    """`data.json` and `images/`."""
    rng = np.random.default_rng(seed)
    lengths = mix("instruct", samples, seed)
    (folder / "images").mkdir(parents=True)
    records = []
    for number, length in enumerate(lengths):
        seen = length > PICTURE  # a few of the longest without a picture get one: only the sum is known
        record = conversation(rng, (length - PICTURE * seen) // SCALE, seen)
        if seen:
            record["image"] = f"images/{number:05}.jpg"
            picture(rng).save(folder / record["image"], quality=90)
        records.append({"id": f"{number:05}", **record})
    (folder / "data.json").write_text(json.dumps(records))


def conversation(rng: np.random.Generator, tokens: int, seen: bool) -> dict[str, Any]:
    """Questions and answers of so many tokens together, template included; two thirds of the words answer."""
    turns = max(1, min(4, tokens // 24))
    words = max(tokens // turns - AROUND_TURNS, 2 * FEWEST_WORDS)
    said = []
    for turn in range(turns):
        asked = max(FEWEST_WORDS, words // 3)
        mark = "<image>\n" if seen and turn == 0 else ""
        said.append({"from": "human", "value": mark + sentence(rng, asked)})
        said.append({"from": "gpt", "value": sentence(rng, words - asked)})
    return {"conversations": said}


def length_of(record: dict[str, Any]) -> int:
    """Tokens of a record, its picture's and the template's among them."""
    words = sum(len(turn["value"].removeprefix("<image>\n").split()) for turn in record["conversations"])
    return words + AROUND_TURNS // 2 * len(record["conversations"]) + VISUAL_TOKENS * ("image" in record)


def samples_for(steps: int) -> int:
    """Somewhat more than as many steps take: an epoch, and no sample twice."""
    return steps * ROWS * ACCUMULATION * 7


def sentence(rng: np.random.Generator, words: int) -> str:
    """Words as often as words are: the k-th one about k times as seldom as the first; each is one token."""
    return " ".join(f"w{rank % WORDS + 1}" for rank in rng.zipf(1.2, words).tolist())


def picture(rng: np.random.Generator) -> Image.Image:
    """Coarse shades, a little larger than the encoder takes."""
    shades = rng.integers(0, 256, (7, 9, 3), np.uint8)
    return Image.fromarray(shades).resize((144, SIDE), Image.Resampling.BICUBIC)


def draw_parts(folder: Path, seed: int, llm: dict[str, int]) -> None:
    """`parts/encoder` and `parts/llm` in Hub format, weights at random."""
    torch.manual_seed(seed)
    ends = {"pad_token_id": 0, "bos_token_id": None, "eos_token_id": SPECIAL.index("<|im_end|>")}
    heads = {"num_key_value_heads": llm["num_attention_heads"] // 2, "max_position_embeddings": 2048}
    LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, **llm, **heads, **ends)).save_pretrained(folder / "parts/llm")
    make_tokenizer().save_pretrained(folder / "parts/llm")
    vision = CLIPVisionConfig(**ENCODER, image_size=SIDE, patch_size=PATCH)
    CLIPVisionModel(vision).save_pretrained(folder / "parts/encoder")
    side = {"height": SIDE, "width": SIDE}
    CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size=side).save_pretrained(folder / "parts/encoder")


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token a word; what is not among the words is unknown."""
    words = [*SPECIAL, *ROLES, *(f"w{number}" for number in range(1, WORDS + 1))]
    backend = Tokenizer(models.WordLevel(dict(zip(words, range(VOCABULARY), strict=True)), unk_token=SPECIAL[1]))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token=SPECIAL[0], unk_token=SPECIAL[1], eos_token="<|im_end|>"
    )
    marks: list[str | AddedToken] = [AddedToken(mark, special=True, normalized=False) for mark in SPECIAL[2:]]
    tokenizer.add_tokens(marks, special_tokens=True)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def draw_stage(folder: Path, seed: int) -> None:
    """`start/` with a connector at random, and `llava/`, its export."""
    config = stage_config(folder, seed)
    processor = build_processor(config)
    torch.manual_seed(seed + 1)
    model = build_model(config.parts(), processor.image_token_id)
    (folder / "start").mkdir()
    save_stage(folder / "start", model, processor, dump_config(config))
    write_files(load(str(folder / "start")), folder / "llava", torch.float32)


def stage_config(folder: Path, seed: int) -> RunConfig:
    """That of a stage which nobody trained."""
    train = {"output_dir": str(folder / "start"), "seed": seed, "learning_rate": {"connector": RATE}}
    return validate({"model": parts(folder), "train": train}, "peers")


def parts(folder: Path) -> dict[str, str]:
    return {"vision_encoder": str(folder / "parts/encoder"), "llm": str(folder / "parts/llm")}


def write_recipe(folder: Path, steps: int) -> None:
    """`finetune.yaml`, by which ours is trained: LLM and connector whole, the encoder frozen, as SFT users do."""
    rate = {"connector": RATE, "llm": RATE}
    rows = {"rows_per_step": ROWS * ACCUMULATION, "rows_per_micro_batch": ROWS, "steps": steps}
    pace = {"learning_rate": rate, "schedule": "constant", "warmup": 0.0, "max_grad_norm": MAX_GRAD_NORM}
    # each way waits for its turn, which is no hang
    train = {"output_dir": str(folder / "ours"), **pace, **rows, "hang_seconds": 0, "audit": "quick"}
    sources = [{"format": "llava", "path": str(folder / "data.json")}]
    data = {"sources": sources, "seq_length": SEQ_LENGTH, "num_workers": 0, "index_dir": str(folder / "index")}
    model = {**parts(folder), "attention": "by_sample"}
    recipe = {"init_from": str(folder / "start"), "model": model, "data": data, "train": train}
    (folder / "finetune.yaml").write_text(json.dumps(recipe, indent=1))  # JSON is YAML


def write_batches(folder: Path, steps: int) -> None:
    """`batches.json`: the samples that our plan has in each step, by their places, in as many batches for those who
    pad; in the order of the file, which has nothing to do with how rows are packed."""
    config = load_config(folder / "finetune.yaml")
    index = build_index(config.data.sources, build_processor(config), SEQ_LENGTH, 0, folder / "index", False)
    plan = make_plan(index, config.data, config.train)
    batches = []
    for step in range(steps):
        numbers = sorted(number for row in plan.rows(step) for number in row)
        cuts = [len(numbers) * part // ACCUMULATION for part in range(ACCUMULATION + 1)]
        batches += [[int(index.id(n)) for n in numbers[a:b]] for a, b in pairwise(cuts)]
    (folder / "batches.json").write_text(json.dumps(batches))
