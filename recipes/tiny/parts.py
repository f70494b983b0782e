"""Train the two tiny parts of the demo, which a real job takes from the Hub.

Enters: a folder by `data_scripts/make_tiny.py`. Leaves: `OUT/vision_encoder` (a CLIP of both towers, its image processor
and tokenizer), `OUT/llm` (a causal LM, its tokenizer with a chat template) and `OUT/parts.json` (losses, seconds). Why:
with these two, "frozen encoder + connector + LLM" means what it means at full size, offline and in two minutes.

The encoder learns from captions alone, the LLM from words alone: neither has seen a question about a picture. The
two train side by side, a process and a core each.

    python recipes/tiny/parts.py --data runs/tiny/data --out runs/tiny/parts
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

os.environ["OMP_NUM_THREADS"] = "1"  # one core each: the two trainings share the machine

import numpy as np
import torch
import tyro
from PIL import Image
from rich.progress import Progress, TimeElapsedColumn
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

IMAGE_SIZE = 64
PATCH_SIZE = 8
BEGIN, PAD, END = "<|begin|>", "<|pad|>", "<|end|>"
ROLES = [f"<|{role}|>" for role in ("system", "user", "assistant")]
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '<|' + message['role'] + '|>' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}"
    "{% else %}{{ message['content'] + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# ----------------------------------------------------------------------------------- what both share


def fit(model: nn.Module, step_loss: Callable[[], Tensor], steps: int, rate: float, title: str) -> dict[str, float]:
    """AdamW with warm-up and cosine decay over `steps` calls of `step_loss`."""
    torch.manual_seed(0)
    decayed = [p for p in model.parameters() if p.ndim > 1]
    kept = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": 0.05}, {"params": kept, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: warm_cosine(step, steps))
    started = time.perf_counter()
    running = 0.0
    for step in range(steps):
        loss = step_loss()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        running = loss.item() if step == 0 else 0.95 * running + 0.05 * loss.item()
        if step % 50 == 49:
            print(f"{title}: step {step + 1}/{steps} loss {running:.4f} {time.perf_counter() - started:.0f}s", flush=True)
    return {"steps": steps, "loss": running, "seconds": time.perf_counter() - started}


def warm_cosine(step: int, steps: int, warm_up: float = 0.05) -> float:
    done = step / steps
    return done / warm_up if done < warm_up else 0.5 * (1 + math.cos(math.pi * (done - warm_up) / (1 - warm_up)))


def endless_order(size: int, generator: torch.Generator) -> Iterator[int]:
    while True:
        yield from torch.randperm(size, generator=generator).tolist()


# ----------------------------------------------------------------------------------- tokenizer


def train_tokenizer(texts: list[str], vocab_size: int = 448) -> PreTrainedTokenizerFast:
    """Byte-level BPE: no text is unknown to it, and the words of the shapes become one token each."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = [PAD, BEGIN, END, *ROLES]
    bpe.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=BEGIN,
        eos_token=END,
        pad_token=PAD,
        extra_special_tokens=ROLES,
        chat_template=CHAT_TEMPLATE,
        model_max_length=1024,
    )


# ----------------------------------------------------------------------------------- llm


def build_llm(tokenizer, width=128, layers=4, heads=4) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=3 * width,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=heads,
            max_position_embeddings=1024,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def encode_chats(tokenizer, chats) -> list[tuple[list[int], list[int]]]:
    """(tokens, 1 where an assistant speaks)"""
    encoded = tokenizer.apply_chat_template(
        [chat["messages"] for chat in chats], return_dict=True, return_assistant_tokens_mask=True
    )
    return list(zip(encoded["input_ids"], encoded["assistant_masks"], strict=True))


def pack(chats, length: int):
    """Whole chats into rows of `length`, first come first served."""
    rows, ids, labels, positions = [], [], [], []
    WEIGHT_ALL = os.environ.get("LLM_ALL", "0") == "1"
    for tokens, spoken in chats:
        if len(ids) + len(tokens) > length:
            rows.append((ids, labels, positions))
            ids, labels, positions = [], [], []
        ids = ids + tokens
        lab = [token if (said or WEIGHT_ALL) else -100 for token, said in zip(tokens, spoken, strict=True)]
        lab[0] = -100
        labels = labels + lab
        positions = positions + list(range(len(tokens)))
    def full(part, value):
        return torch.tensor([row + [value] * (length - len(row)) for row in part])
    a, b, c = zip(*rows, strict=True)
    return full(a, 0), full(b, -100), full(c, 0)


def train_llm(data: Path, out: Path, steps: int, rows: int, length: int, rate: float, width: int, layers: int):
    tokenizer = PreTrainedTokenizerFast.from_pretrained(out / "llm")
    model = build_llm(tokenizer, width, layers)
    t = time.perf_counter()
    ids, labels, positions = pack(encode_chats(tokenizer, read_lines(data / "texts.jsonl")), length)
    print("llm params", sum(p.numel() for p in model.parameters()), "rows", ids.shape, "encode", time.perf_counter() - t, "fill", (positions>0).float().mean())
    order = endless_order(len(ids), torch.Generator().manual_seed(0))

    def step_loss() -> Tensor:
        chosen = [next(order) for _ in range(rows)]
        return model(
            input_ids=ids[chosen], labels=labels[chosen], position_ids=positions[chosen], use_cache=False
        ).loss

    report = fit(model.train(), step_loss, steps, rate, "llm")
    model.save_pretrained(out / "llm")
    return report


# ----------------------------------------------------------------------------------- clip


def load_pixels(data: Path, paths: list[str]) -> Tensor:
    return torch.from_numpy(np.stack([np.asarray(Image.open(data / path)) for path in paths])).permute(0, 3, 1, 2)


def build_clip(tokenizer, width, layers, text_width, text_layers) -> CLIPModel:
    torch.manual_seed(0)
    return CLIPModel(
        CLIPConfig(
            vision_config=dict(
                image_size=IMAGE_SIZE, patch_size=PATCH_SIZE, hidden_size=width, intermediate_size=4 * width,
                num_hidden_layers=layers, num_attention_heads=width // 32, projection_dim=width,
            ),
            text_config=dict(
                vocab_size=len(tokenizer), hidden_size=text_width, intermediate_size=4 * text_width,
                num_hidden_layers=text_layers, num_attention_heads=text_width // 32, max_position_embeddings=48,
                bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id, projection_dim=width,
            ),
            projection_dim=width,
        )
    )


def train_clip(data: Path, out: Path, steps: int, batch: int, rate: float, width: int, layers: int, text_width: int, text_layers: int):
    tokenizer = PreTrainedTokenizerFast.from_pretrained(out / "llm")
    lines = read_lines(data / "captions.jsonl")
    t = time.perf_counter()
    pixels = load_pixels(data, [line["image"] for line in lines])
    scale = pixels.float() / 255
    mean, std = scale.mean((0, 2, 3)), scale.std((0, 2, 3))
    CLIPImageProcessor(size={"shortest_edge": IMAGE_SIZE}, crop_size=IMAGE_SIZE, image_mean=mean.tolist(), image_std=std.tolist()).save_pretrained(out / "vision_encoder")
    per = len(lines[0]["captions"])
    texts = [BEGIN + c + END for line in lines for c in line["captions"]]
    tokens = tokenizer(texts, padding=True, return_tensors="pt")["input_ids"].view(len(lines), per, -1)
    model = build_clip(tokenizer, width, layers, text_width, text_layers)
    print("clip params", sum(p.numel() for p in model.vision_model.parameters()), sum(p.numel() for p in model.text_model.parameters()), tokens.shape, time.perf_counter() - t, mean, std)
    order = endless_order(len(lines), torch.Generator().manual_seed(0))
    draw = torch.Generator().manual_seed(1)

    def step_loss() -> Tensor:
        chosen = torch.tensor([next(order) for _ in range(batch)])
        which = torch.randint(per, (batch,), generator=draw)
        ids = tokens[chosen, which]
        ids = ids[:, : int((ids != tokenizer.pad_token_id).sum(1).max())]
        images = (pixels[chosen].float() / 255 - mean[:, None, None]) / std[:, None, None]
        output = model(input_ids=ids, pixel_values=images)
        same = F.cross_entropy(output.logits_per_image, torch.arange(batch)), F.cross_entropy(output.logits_per_text, torch.arange(batch))
        return sum(same) / 2

    report = fit(model.train(), step_loss, steps, rate, "vision encoder")
    model.save_pretrained(out / "vision_encoder")
    tokenizer.save_pretrained(out / "vision_encoder")
    return report

def main(data: Path, out: Path, only: Literal["tok", "llm", "clip"], steps: int = 300, batch: int = 128, rate: float = 1e-3, width: int = 128, layers: int = 4, length: int = 512, rows: int = 8, text_width: int = 64, text_layers: int = 2):
    torch.set_num_threads(1)
    if only == "tok":
        texts = [m["content"] for chat in read_lines(data / "texts.jsonl")[:4000] for m in chat["messages"]]
        tok = train_tokenizer(texts)
        tok.save_pretrained(out / "llm")
        print(tok.tokenize("a large red triangle at the top left and an orange circle\nWhat colour is it? red triangle"), len(tok))
        print(tok.apply_chat_template([{"role":"user","content":"hi there"}], add_generation_prompt=True, tokenize=False))
    if only == "llm":
        print(train_llm(data, out, steps, rows, length, rate, width, layers))
    if only == "clip":
        print(train_clip(data, out, steps, batch, rate, width, layers, text_width, text_layers))

if __name__ == "__main__":
    tyro.cli(main)
