"""The data that loaders are measured on, drawn here: no download, and the same bytes wherever they are drawn.

Enters: a folder and a number of samples. Leaves: photographs' doubles as JPEG files (COCO's sizes and about its bytes
a pixel: how long a decoder takes hangs on both), half of them with a caption, half with a conversation, once as
LLaVA's JSON beside the folder and once as WebDataset tars; and a processor of CLIP's size with a tokenizer trained
on the same words.
"""

from __future__ import annotations

import io
import json
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import CLIPImageProcessor, PreTrainedTokenizerFast

from mllm.data.processor import Processor

SIZES, SHARES = [(640, 480), (640, 427), (480, 640)], [0.5, 0.25, 0.25]
QUALITY = 92
"""With the grain below, 640 x 480 pixels are about 150 kB, as in COCO."""
GRAIN = 9.0
SHARD = 64
"""Samples of a tar."""
SIDE, VISUAL_TOKENS = 336, 576
"""CLIP-L/14-336, LLaVA-1.5's encoder."""
SYLLABLES = ("ba", "do", "ki", "lu", "me", "nor", "pi", "ras", "sto", "tu", "vel", "wen", "xo", "yar", "zi", "ing")
SPECIAL = ["<|pad|>", "<|im_start|>", "<|im_end|>"]
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass(frozen=True)
class Drawn:
    """The same samples in two layouts."""

    json: Path
    shards: list[Path]
    samples: int
    image_bytes: int
    """Of all images."""
    processor: Processor


def draw(folder: Path, samples: int, seed: int = 0) -> Drawn:
    """Write the samples; a picture each."""
    rng = np.random.default_rng(seed)
    words = vocabulary(rng)
    (folder / "images").mkdir()
    (folder / "shards").mkdir()
    records, pictures = [], []
    for number in range(samples):
        pictures.append(photograph(rng))
        records.append(record(rng, words, number))
        (folder / records[-1]["image"]).write_bytes(pictures[-1])
    (folder / "data.json").write_text(json.dumps(records))
    shards = write_shards(folder / "shards", records, pictures)
    said = [turn["value"] for each in records for turn in each["conversations"]]
    return Drawn(folder / "data.json", shards, samples, sum(map(len, pictures)), make_processor(said))


def photograph(rng: np.random.Generator) -> bytes:
    """A JPEG of soft shades of all sizes under fine grain."""
    size = SIZES[rng.choice(len(SIZES), p=SHARES)]
    shades = np.zeros((size[1], size[0], 3), np.float32)
    for cells, strength in ((4, 60), (24, 30), (120, 15)):
        coarse = Image.fromarray(rng.integers(0, 256, (cells, cells, 3), np.uint8))
        shades += (np.asarray(coarse.resize(size, Image.Resampling.BICUBIC), np.float32) - 128) * strength / 64
    shades += GRAIN * rng.standard_normal(shades.shape, np.float32)
    file = io.BytesIO()
    Image.fromarray((shades + 128).clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=QUALITY)
    return file.getvalue()


def vocabulary(rng: np.random.Generator, number: int = 2000) -> list[str]:
    return ["".join(rng.choice(SYLLABLES, rng.integers(1, 4))) for _ in range(number)]


def record(rng: np.random.Generator, words: list[str], number: int) -> dict[str, Any]:
    """A caption under its bare image, as in the first stage, or questions and answers, as in the second."""
    said = []
    for turn in range(1 if number % 2 else int(rng.integers(2, 6))):
        asked = ("<image>" if turn == 0 else "") + ("" if number % 2 else "\n" + sentence(rng, words, 10))
        said.append({"from": "human", "value": asked})
        said.append({"from": "gpt", "value": sentence(rng, words, 20 if number % 2 else 35)})
    return {"id": f"{number:06}", "image": f"images/{number:06}.jpg", "conversations": said}


def sentence(rng: np.random.Generator, words: list[str], median: float) -> str:
    """Words as often as words are: the k-th one k times as seldom as the first."""
    ranks = np.minimum(rng.zipf(1.3, max(3, int(rng.lognormal(np.log(median), 0.5)))), len(words)) - 1
    return " ".join(words[rank] for rank in ranks).capitalize() + "."


def write_shards(folder: Path, records: list[dict[str, Any]], pictures: list[bytes]) -> list[Path]:
    """KEY.jpg and KEY.json of each sample, in tars."""
    paths = []
    for start in range(0, len(records), SHARD):
        paths.append(folder / f"{start // SHARD:05}.tar")
        with tarfile.open(paths[-1], "w", format=tarfile.USTAR_FORMAT) as tar:
            for described, picture in zip(records[start : start + SHARD], pictures[start : start + SHARD], strict=True):
                told = {key: value for key, value in described.items() if key != "image"}
                for suffix, data in (("jpg", picture), ("json", json.dumps(told).encode())):
                    member = tarfile.TarInfo(f"{described['id']}.{suffix}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    return paths


def make_processor(said: list[str]) -> Processor:
    """A byte-level BPE of these words with ChatML, and CLIP's own image processor."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=4096, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(said, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token=SPECIAL[0], eos_token=SPECIAL[2])
    tokenizer.add_tokens([AddedToken(SPECIAL[1], special=True)], special_tokens=True)
    tokenizer.chat_template = CHATML
    side = {"height": SIDE, "width": SIDE}
    return Processor(tokenizer, CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size=side), VISUAL_TOKENS)
