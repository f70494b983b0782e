"""A model that transformers loads, asked as one of ours: what `mllm export` wrote and `mllm push` sent.

Enters: a folder or Hub id. Leaves: whoever answers: `Assistant` for a stage, `StockAssistant` for an exported folder
or any other model of transformers' image-text-to-text classes. Its own processor and chat template build the prompt;
pictures come through our one door.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from mllm.data.images import open_image
from mllm.decoding.threaded import words_of
from mllm.decoding.words import from_first_word
from mllm.generate import Assistant, Decoding, find_folder
from mllm.types import Frame, Mark, Sample, Video


def load_assistant(model: str, decoding: Decoding = "recorded") -> Assistant | StockAssistant:
    """Whoever answers for a stage folder, an exported folder, or the Hub id of one.

    Raises:
        ValueError: it is none of these.
    """
    folder = find_folder(model)
    return StockAssistant(folder) if is_stock(folder) else Assistant.load(folder, decoding=decoding)


def is_stock(folder: Path) -> bool:
    """Whether transformers has a class for it that reads images and writes text, and it is no stage."""
    told = folder / "config.json"
    if (folder / "config.yaml").is_file() or not told.is_file():
        return False
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as STOCK

    config = json.loads(told.read_text())
    return config.get("model_type") in STOCK or "AutoModelForImageTextToText" in config.get("auto_map", {})


class StockAssistant:
    """A model of transformers with its processor."""

    compiles = False

    def __init__(self, folder: Path, device: str | None = None) -> None:
        from transformers import AutoModelForImageTextToText, AutoProcessor

        try:
            self.processor: Any = AutoProcessor.from_pretrained(folder)
            model = AutoModelForImageTextToText.from_pretrained(folder, dtype="auto")
        except (OSError, KeyError, ImportError) as error:
            raise ValueError(f"{folder} cannot be loaded by transformers: {error}") from error
        self.model: Any = model.eval().to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.tokenizer: Any = self.processor.tokenizer
        self.tokenizer.padding_side = "left"

    @torch.inference_mode()
    def answer(self, samples: Sequence[Sample], max_new_tokens: int = 32) -> list[str]:
        """The greedy answer to each conversation, all in one batch."""
        asked = self.asked(samples, max_new_tokens)
        new = self.model.generate(**asked)[:, asked["input_ids"].shape[1] :]  # [B, new tokens]
        return [words.strip() for words in self.tokenizer.batch_decode(new, skip_special_tokens=True)]

    def stream(self, sample: Sample, max_new_tokens: int = 256) -> Iterator[str]:
        """The greedy answer to one conversation, piece by piece as it is found."""
        asked = self.asked([sample], max_new_tokens)
        yield from from_first_word(words_of(self.model, self.tokenizer, asked, skip_prompt=True))

    def asked(self, samples: Sequence[Sample], max_new_tokens: int) -> dict[str, Any]:
        """What `generate` is given: the conversations through the processor's own template."""
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {max_new_tokens}: an answer has at least one token")
        inputs = self.processor.apply_chat_template(
            [as_parts(sample) for sample in samples],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            padding=True,
        ).to(self.model.device, self.model.dtype)
        return {**inputs, "max_new_tokens": max_new_tokens, "do_sample": False, "repetition_penalty": 1.0}


def as_parts(sample: Sample) -> list[dict[str, Any]]:
    """A conversation in the content parts of transformers; the newline behind an image is the template's to put.

    Raises:
        ValueError: places and images differ in number, or a video is shown.
    """
    if any(isinstance(image, Video | Frame) for image in sample.images):
        raise ValueError("a model in transformers' form is shown images alone: videos need the stage folder")
    marks = sum(message.num_images for message in sample.messages)
    if marks != len(sample.images):
        raise ValueError(f"{sample.where or sample.id}: {marks} <image> placeholders, {len(sample.images)} images")
    images = iter(sample.images)
    return [
        {
            "role": message.role,
            "content": [
                {"type": "image", "image": open_image(next(images))}
                if part is Mark.IMAGE
                else {"type": "text", "text": part}
                for part in message.content
                if part != "\n"
            ],
        }
        for message in sample.messages
    ]
