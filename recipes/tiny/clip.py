"""Train a small CLIP on pictures and short captions of them.

Enters: `captions.jsonl` with its pictures, and the tokenizer in `OUT/llm`. Leaves: `OUT/vision_encoder`, an ordinary
CLIP folder with both towers, image processor and tokenizer.

Shapes: N images, U captions.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, PreTrainedTokenizerFast

from training import Report, batches, fit, read_lines
from vocabulary import BEGIN, END

IMAGE_SIZE = 64
COLOURS = frozenset(["red", "green", "blue", "yellow", "purple", "orange", "black", "pink", "brown", "gray", "teal"])
"""Words that a colourless picture cannot bear out."""


@dataclass(frozen=True)
class EncoderConfig:
    """The vision encoder's grid and training."""

    steps: int = 300
    patch_size: int = 16
    grey_share: float = 0.5
    """Pictures shown without colour, and told without it: only so is a shape learned apart from the colours it came
    in."""
    turn: bool = False
    """Show each picture in all eight ways to lay it down; right only where no caption tells a place."""


def train_clip(data: Path, out: Path, config: EncoderConfig) -> Report:
    """Learn which short captions fit which picture."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(out / "llm")
    lines = read_lines(data / "captions.jsonl")
    pixels = load_pixels([data / line["image"] for line in lines])
    processor = fit_processor(pixels)
    captions, fits = caption_table([line["phrases"] for line in lines])
    colourless = torch.tensor([not COLOURS.intersection(caption.split()) for caption in captions])  # [U]
    tokens = tokenizer([BEGIN + caption + END for caption in captions], padding=True, return_tensors="pt").input_ids
    model = build_clip(tokenizer, config.patch_size).train()
    order = batches(len(lines), batch=128)
    generator = torch.Generator().manual_seed(1)

    def next_loss() -> Tensor:
        chosen = next(order)
        grey = torch.rand(len(chosen), generator=generator) < config.grey_share  # [N]
        may_say = fits[chosen] & (colourless | ~grey[:, None])  # [N, U]
        asked = torch.multinomial(may_say.float(), 6, replacement=True, generator=generator).unique()
        images = pixels[chosen] / 255
        images = turned(images, generator) if config.turn else images
        images = torch.where(grey[:, None, None, None], images.mean(1, keepdim=True), images)
        logits = model(input_ids=tokens[asked], pixel_values=normalise(images, processor)).logits_per_image
        unknowable = grey[:, None] & ~colourless[asked]  # [N, asked]
        return contrast(logits.masked_fill(unknowable, -1e4), may_say[:, asked].float())

    report = fit(model, next_loss, config.steps, "vision encoder")
    for part in (model, processor, tokenizer):
        part.save_pretrained(out / "vision_encoder")
    return report


def build_clip(
    tokenizer: PreTrainedTokenizerFast, patch_size: int, width: int = 128, text_width: int = 64
) -> CLIPModel:
    torch.manual_seed(0)
    vision = {"image_size": IMAGE_SIZE, "patch_size": patch_size, "num_hidden_layers": 4}
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


def turned(images: Tensor, generator: torch.Generator) -> Tensor:
    """Each image [N, 3, H, H] in one of the eight ways to lay a square down."""
    coins = torch.rand(3, len(images), 1, 1, 1, generator=generator) < 0.5
    images = torch.where(coins[0], images.flip(3), images)
    images = torch.where(coins[1], images.flip(2), images)
    return torch.where(coins[2], images.transpose(2, 3), images)


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
