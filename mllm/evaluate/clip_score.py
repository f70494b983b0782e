"""How well words fit an image, by any model that maps both into one space: CLIP, SigLIP and their kin.

Enters: the Hub id or folder of such a model; images and words. Leaves: their cosine, -1 to 1 (CLIPScore without its
factor of 2.5; J. Hessel and others, 2021). LAION kept pairs of at least 0.28 to 0.3 of CLIP ViT-B/32; other models have
other scales. Words beyond the model's window are cut off, as CLIP itself does.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mllm.models.build import named

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

AT_ONCE = 64
"""Images that the model sees at a time."""
DIGITS = 6
"""Of a score that are written down: more differ from machine to machine."""


class ClipScorer:
    """The model with its tokenizer and image processor."""

    def __init__(self, name: str, device: torch.device | str = "cpu") -> None:
        """Read the model.

        Raises:
            ValueError: there is none at that name, or it does not score images and words.
        """
        from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

        with named("image-text model", name):
            self.model: Any = AutoModel.from_pretrained(name, dtype=torch.float32).to(device).eval()
            self.tokenizer = AutoTokenizer.from_pretrained(name)
            self.see = partial(see, AutoImageProcessor.from_pretrained(name))
        if not hasattr(self.model.config, "text_config") or not hasattr(self.model, "logit_scale"):
            raise ValueError(f"{name} is a {self.model.config.model_type}: give a model such as CLIP or SigLIP")
        self.name, self.device = name, device
        self.window = self.model.config.text_config.max_position_embeddings

    @property
    def kind(self) -> str:
        """Names these scores where they are kept: another one for other weights in the same folder."""
        files = sorted(Path(self.name).glob("*.safetensors")) if Path(self.name).is_dir() else []
        state = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
        return "clip-" + hashlib.sha256(repr((self.name, state)).encode()).hexdigest()[:16]

    def __call__(self, seen: Sequence[Mapping[str, Tensor]], texts: Sequence[str]) -> list[float]:
        """The cosine of each image and its words."""
        scores: list[float] = []
        for start in range(0, len(seen), AT_ONCE):
            part = slice(start, start + AT_ONCE)
            scores += self.cosines(seen[part], texts[part]).tolist()
        return [round(score, DIGITS) for score in scores]

    @torch.inference_mode()
    def cosines(self, seen: Sequence[Mapping[str, Tensor]], texts: Sequence[str]) -> Tensor:
        """[N] float32. All words are padded to the window, as SigLIP was trained, so that no text sways another."""
        words = self.tokenizer(
            list(texts), padding="max_length", truncation=True, max_length=self.window, return_tensors="pt"
        )
        images = {key: torch.cat([each[key] for each in seen]) for key in seen[0]}
        out = self.model(**{key: value.to(self.device) for key, value in {**images, **words}.items()})
        both = torch.nn.functional.normalize(torch.stack([out.image_embeds, out.text_embeds]).float(), dim=-1)
        return (both[0] * both[1]).sum(-1).cpu()


def see(image_processor: Any, image: Image) -> Mapping[str, Tensor]:
    """What the model wants of an image, each [1, ...]; done where images are decoded."""
    return dict(image_processor(images=[image], return_tensors="pt"))
