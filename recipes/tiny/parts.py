"""Train the two tiny parts of the demo, which a real job takes from the Hub.

Enters: a folder by `data_scripts/make_tiny.py`. Leaves: `OUT/vision_encoder` (a CLIP with both towers, its image
processor and tokenizer), `OUT/llm` (a causal LM, its tokenizer with a chat template) and `OUT/parts.json` (losses,
seconds). Why: with these two, "frozen encoder + connector + LLM" means what it means at full size, offline.

The encoder learns from captions alone, the LLM from words alone: neither has seen a question about a picture. They
train side by side, one process and one core each.

    python recipes/tiny/parts.py --data runs/tiny/data --out runs/tiny/parts

Shapes: N images, U captions, T tokens, B rows, S tokens in a row.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # two trainings on two cores; a second thread each would only spin
os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the two processes are forked

import numpy as np
import torch
import tyro
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

Report = dict[str, float]
IGNORE_INDEX = -100
IMAGE_SIZE = 64
PATCH_SIZE = 16
GREY_SHARE = 0.5
"""Pictures shown without colour, and told without it: only so is a shape learned apart from the colours it came in."""
COLOURS = frozenset(["red", "green", "blue", "yellow", "purple", "orange", "black", "pink", "brown", "gray", "teal"])
"""Words that a colourless picture cannot bear out."""
BEGIN, PAD, END = "<|begin|>", "<|pad|>", "<|end|>"
ROLES = ["<|system|>", "<|user|>", "<|assistant|>"]
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '<|' + message['role'] + '|>' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}"
    "{% else %}{{ message['content'] + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def main(data: Path, out: Path, clip_steps: int = 300, llm_steps: int = 270) -> None:
    """Train both parts.

    Args:
        data: A folder by `data_scripts/make_tiny.py`.
        out: Where the parts go.
        clip_steps: Steps of the vision encoder.
        llm_steps: Steps of the LLM.
    """
    started = time.perf_counter()
    train_tokenizer(data).save_pretrained(out / "llm")
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("fork")) as pool:
        clip = pool.submit(train_clip, data, out, clip_steps)
        llm = pool.submit(train_llm, data, out, llm_steps)
        reports = {"vision_encoder": clip.result(), "llm": llm.result()}
    reports["seconds"] = time.perf_counter() - started
    (out / "parts.json").write_text(json.dumps(reports, indent=1))
    print(json.dumps(reports, indent=1))


# ------------------------------------------------------------------------------------- what both share


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def fit(model: nn.Module, next_loss: Callable[[], Tensor], steps: int, title: str) -> Report:
    """Take `steps` on what `next_loss` returns; the rates warm up, then fall as a cosine."""
    torch.set_num_threads(1)
    optimizers = make_optimizers(model)
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: warm_cosine((step + 1) / steps))
        for optimizer in optimizers
    ]
    started = time.perf_counter()
    smooth = math.nan
    for step in range(1, steps + 1):
        loss = next_loss()
        model.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for stepper in (*optimizers, *schedules):
            stepper.step()
        smooth = loss.item() if step == 1 else 0.95 * smooth + 0.05 * loss.item()
        if step % 50 == 0 or step == steps:
            seconds = time.perf_counter() - started
            print(f"{title:14} step {step:5}/{steps}  loss {smooth:.3f}  {seconds:4.0f} s", flush=True)
    return {"steps": steps, "loss": smooth, "seconds": time.perf_counter() - started}


def make_optimizers(model: nn.Module) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the layers, which learns small models in fewer steps; AdamW for all else."""
    inner = {id(p) for name, p in model.named_parameters() if p.ndim == 2 and "layers." in name}
    matrices = [p for p in model.parameters() if id(p) in inner]
    others = [p for p in model.parameters() if id(p) not in inner]
    return [
        torch.optim.Muon(matrices, lr=0.02, weight_decay=0.05),
        torch.optim.AdamW(others, lr=2e-3, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def warm_cosine(done: float, warm_up: float = 0.05) -> float:
    """The share of the full rate when `done` (0 to 1) of the training is behind."""
    return min(done / warm_up, 0.5 * (1 + math.cos(math.pi * done)))


def batches(size: int, batch: int) -> Iterator[Tensor]:
    """Indices [batch] for ever, each epoch in a new order."""
    generator = torch.Generator().manual_seed(0)
    while True:
        yield from torch.randperm(size, generator=generator)[: size - size % batch].split(batch)


# ------------------------------------------------------------------------------------------- tokenizer


def train_tokenizer(data: Path) -> PreTrainedTokenizerFast:
    """Byte-level BPE: nothing is unknown to it, and each word of the shapes becomes one token.

    A space is put before each text, so that "red" as an answer is the same token as "red" in a sentence.
    """
    words = (message["content"] for chat in read_lines(data / "texts.jsonl") for message in chat["messages"])
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=448, special_tokens=[PAD, BEGIN, END, *ROLES], initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(words, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=BEGIN,
        eos_token=END,
        pad_token=PAD,
        extra_special_tokens=ROLES,
        chat_template=CHAT_TEMPLATE,
        model_max_length=1024,
    )


# ------------------------------------------------------------------------------------------------- llm


def train_llm(data: Path, out: Path, steps: int) -> Report:
    """Learn to answer from a scene told in words, where a picture's tokens will stand later."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(out / "llm")
    input_ids, labels, position_ids = pack(encode(tokenizer, read_lines(data / "texts.jsonl")), length=128)
    model = build_llm(tokenizer).train()
    order = batches(len(input_ids), batch=32)

    def next_loss() -> Tensor:
        rows = next(order)
        # no mask and no cache: positions that restart are how transformers keeps packed chats apart
        inputs = {"input_ids": input_ids[rows], "position_ids": position_ids[rows]}
        states = model.model(**inputs, use_cache=False).last_hidden_state  # [B, S, D]
        following = labels[rows][:, 1:]
        said = following != IGNORE_INDEX
        return nn.functional.cross_entropy(model.lm_head(states[:, :-1][said]), following[said])

    report = fit(model, next_loss, steps, "llm")
    model.save_pretrained(out / "llm")
    return report


def build_llm(
    tokenizer: PreTrainedTokenizerFast, width: int = 128, layers: int = 2, heads: int = 8
) -> Qwen3ForCausalLM:
    """Two layers: one to gather what is asked, one to look it up. In as many steps, more of them learned less."""
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=32,
        max_position_embeddings=1024,
        initializer_range=0.8 / math.sqrt(width),  # the usual 0.02 suits a width in the thousands
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return Qwen3ForCausalLM(config)


Chat = tuple[list[int], list[int]]
"""Token ids, and their labels: the assistant's words and the end of its turn."""


def encode(tokenizer: PreTrainedTokenizerFast, chats: list[dict[str, Any]]) -> Iterator[Chat]:
    encoded = tokenizer.apply_chat_template(
        [chat["messages"] for chat in chats], return_dict=True, return_assistant_tokens_mask=True
    )
    for tokens, spoken in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True):
        yield tokens, [token if said else IGNORE_INDEX for token, said in zip(tokens, spoken, strict=True)]


def pack(chats: Iterator[Chat], length: int) -> tuple[Tensor, Tensor, Tensor]:
    """Whole chats side by side, first come first served: input_ids, labels, position_ids [B, length]."""
    rows: list[list[Chat]] = [[]]
    used = 0
    for chat in chats:
        if used + len(chat[0]) > length:
            rows.append([])
            used = 0
        rows[-1].append(chat)
        used += len(chat[0])
    input_ids = [[token for tokens, _ in row for token in tokens] for row in rows]
    labels = [[label for _, row_labels in row for label in row_labels] for row in rows]
    positions = [[position for tokens, _ in row for position in range(len(tokens))] for row in rows]
    return fill(input_ids, 0, length), fill(labels, IGNORE_INDEX, length), fill(positions, 0, length)


def fill(rows: list[list[int]], value: int, length: int) -> Tensor:
    return torch.tensor([row + [value] * (length - len(row)) for row in rows])


# -------------------------------------------------------------------------------------- vision encoder


def train_clip(data: Path, out: Path, steps: int) -> Report:
    """Learn which short captions fit which picture."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(out / "llm")
    lines = read_lines(data / "captions.jsonl")
    pixels = load_pixels([data / line["image"] for line in lines])
    processor = fit_processor(pixels)
    captions, fits = caption_table([line["phrases"] for line in lines])
    colourless = torch.tensor([not COLOURS.intersection(caption.split()) for caption in captions])  # [U]
    tokens = tokenizer([BEGIN + caption + END for caption in captions], padding=True, return_tensors="pt").input_ids
    model = build_clip(tokenizer).train()
    order = batches(len(lines), batch=128)
    generator = torch.Generator().manual_seed(1)

    def next_loss() -> Tensor:
        chosen = next(order)
        grey = torch.rand(len(chosen), generator=generator) < GREY_SHARE  # [N]
        may_say = fits[chosen] & (colourless | ~grey[:, None])  # [N, U]
        asked = torch.multinomial(may_say.float(), 6, replacement=True, generator=generator).unique()
        images = pixels[chosen] / 255
        images = torch.where(grey[:, None, None, None], images.mean(1, keepdim=True), images)
        logits = model(input_ids=tokens[asked], pixel_values=normalise(images, processor)).logits_per_image
        unknowable = grey[:, None] & ~colourless[asked]  # [N, asked]
        return contrast(logits.masked_fill(unknowable, -1e4), may_say[:, asked].float())

    report = fit(model, next_loss, steps, "vision encoder")
    for part in (model, processor, tokenizer):
        part.save_pretrained(out / "vision_encoder")
    return report


def build_clip(tokenizer: PreTrainedTokenizerFast, width: int = 128, text_width: int = 64) -> CLIPModel:
    torch.manual_seed(0)
    vision = {"image_size": IMAGE_SIZE, "patch_size": PATCH_SIZE, "num_hidden_layers": 4}
    text = {"vocab_size": len(tokenizer), "max_position_embeddings": 48, "num_hidden_layers": 1}
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    model = CLIPModel(
        CLIPConfig(
            vision_config=vision | tower(width, projection=width),
            text_config=text | ends | tower(text_width, projection=width),
            projection_dim=width,
        )
    )
    # the usual 0.02 drowns beside a patch: where something stands would be forgotten on the way up
    nn.init.normal_(model.vision_model.embeddings.position_embedding.weight, std=0.8)
    return model


def tower(width: int, projection: int) -> dict[str, int]:
    return {
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_attention_heads": 4,
        "projection_dim": projection,
    }


def load_pixels(paths: list[Path]) -> Tensor:
    """All pictures at once, uint8 [N, 3, H, W]: decoding them again in each epoch would cost more than a step."""
    return torch.from_numpy(np.stack([np.asarray(Image.open(path)) for path in paths])).permute(0, 3, 1, 2)


def fit_processor(pixels: Tensor) -> CLIPImageProcessor:
    """The image processor of these pictures: their size, their mean and spread."""
    shares = pixels.float() / 255
    return CLIPImageProcessor(
        size={"shortest_edge": IMAGE_SIZE},
        crop_size=IMAGE_SIZE,
        image_mean=shares.mean((0, 2, 3)).tolist(),
        image_std=shares.std((0, 2, 3)).tolist(),
    )


def normalise(images: Tensor, processor: CLIPImageProcessor) -> Tensor:
    mean, spread = torch.tensor(processor.image_mean), torch.tensor(processor.image_std)
    return (images - mean[:, None, None]) / spread[:, None, None]


def caption_table(captions: list[list[str]]) -> tuple[list[str], Tensor]:
    """All different captions [U], and which of them fit which image [N, U] bool."""
    different = sorted({caption for some in captions for caption in some})
    number = {caption: index for index, caption in enumerate(different)}
    fits = torch.zeros(len(captions), len(different), dtype=torch.bool)
    for image, some in enumerate(captions):
        fits[image, [number[caption] for caption in some]] = True
    return different, fits


def contrast(logits: Tensor, fits: Tensor) -> Tensor:
    """CLIP's symmetric loss where several captions may fit an image, and several images a caption [N, U].

    Its targets share 1 among all that fit: a caption that happens to fit another image too is no false negative.
    """
    to_captions = -(fits / fits.sum(1, keepdim=True).clamp(min=1) * logits.log_softmax(1)).sum(1).mean()
    to_images = -(fits / fits.sum(0, keepdim=True).clamp(min=1) * logits.log_softmax(0)).sum(0).mean()
    return (to_captions + to_images) / 2


if __name__ == "__main__":
    tyro.cli(main)
