"""Every family of encoders, every connector, every family of LLMs: a tiny random model of each cell, and who loads it.

Enters: nothing. Leaves: models for `test_matrix_*.py` and `export/test_cells.py`, and the page between two marks of
`recipes/README.md`.

    python tests/models/matrix.py
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import cache
from itertools import product
from math import isqrt
from pathlib import Path
from typing import Any, get_args

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

import torch
from transformers import CLIPImageProcessor

from conftest import LLM_CONFIGS, make_image_processor, make_llm, make_sample, make_tokenizer
from mllm.data.processor import Processor
from mllm.export.gguf import llm, vision
from mllm.export.homes import find_home
from mllm.models.connectors import ConnectorConfig
from mllm.models.multimodal import MultimodalLM
from mllm.models.vision_encoder import VisionEncoder
from mllm.models.vision_grid import Grid
from mllm.oracle import in_llama_cpp
from mllm.types import Example, Normalisation
from models import grids
from models.encoder_families import MODELS, SIDE
from models.grids import Answer

README = Path(__file__).parents[2] / "recipes" / "README.md"
BEGIN, END = "<!-- matrix -->\n", "<!-- /matrix -->"
KINDS = {kind.__dataclass_fields__["type"].default: kind for kind in get_args(get_args(ConnectorConfig)[0])}
SMALL = {"hidden_size": 16, "num_layers": 2, "num_heads": 2, "num_queries": 3, "depth": 2}
VARIANTS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "mlp, norm": ("mlp", {"norm": True}, {}),
    "mlp, feature_norm": ("mlp", {}, {"feature_norm": True}),
    "avg_pool, tokens 1, depth 1, feature_norm": ("avg_pool", {"tokens": 1, "depth": 1}, {"feature_norm": True}),
    "pixel_shuffle, swiglu, feature_norm": ("pixel_shuffle", {"activation": "swiglu"}, {"feature_norm": True}),
    "pixel_shuffle, depth 1, norm": ("pixel_shuffle", {"depth": 1, "norm": True}, {}),
}
"""Other settings of a connector, and of where it reads the encoder, that live in another class than its plain ones."""
ENCODERS, CONNECTORS, LLMS = list(MODELS), list(KINDS), list(LLM_CONFIGS)
IMAGE_TEXT = ("clip", "siglip", "naflex")
"""Encoders that learned from pictures with texts."""
ATTENTION = {"gemma2": "eager"}
"""Gemma 2 caps its attention scores, which sdpa cannot."""
WINDOW = 48
"""Wider than a sample, so that its answer sees its image; narrower than a row."""


@dataclass(frozen=True)
class Cell:
    encoder: str
    connector: str
    """Plain, or one of `VARIANTS`."""
    llm: str

    def __str__(self) -> str:
        return f"{self.encoder}-{self.connector.replace(', ', '_').replace(' ', '_')}-{self.llm}"

    def model(self, seed: int = 0) -> MultimodalLM:
        """Encoder and LLM are one and the same in all cells that have them: frozen, as parts named by an id are.
        The connector is a fresh one."""
        encoder, words = encoder_of(self.encoder, **self.tap()), llm_of(self.llm)
        torch.manual_seed(seed)
        connector = self.connector_config().build(encoder.width, words.config.hidden_size, encoder.num_patches)
        return MultimodalLM(encoder, connector, words, self.processor().image_token_id)

    def connector_config(self) -> Any:
        """A small one, for any square number of patches."""
        kind, settings, _ = VARIANTS.get(self.connector, (self.connector, {}, {}))
        side = isqrt(encoder_of(self.encoder).num_patches)
        sizes = {**SMALL, "factor": 2 if side % 2 == 0 else side, "tokens": (side - 1) ** 2}
        fields = KINDS[kind].__dataclass_fields__
        return KINDS[kind](**{field: value for field, value in sizes.items() if field in fields} | settings)

    def tap(self) -> dict[str, Any]:
        """Where the connector reads the encoder, where that is not the default."""
        return VARIANTS[self.connector][2] if self.connector in VARIANTS else {}

    def processor(self) -> Processor:
        return shared_processor(*self.sizes())

    def examples(self) -> list[Example]:
        """Conversations about one picture, none, and two."""
        return list(shared_examples(*self.sizes()))

    def sizes(self) -> tuple[int, int]:
        """The side of an image, and how many visual tokens it becomes."""
        grid = encoder_of(self.encoder).grid
        return grid.side, self.connector_config().num_tokens(grid.num_patches)


PLAIN = [Cell(*names) for names in product(ENCODERS, CONNECTORS, LLMS)]
VARIED = [Cell(*names) for names in product(ENCODERS, VARIANTS, LLMS)]


@cache
def encoder_of(family: str, **tap: Any) -> VisionEncoder:
    """At the size that the image processor of its checkpoint says."""
    torch.manual_seed(0)
    whole: Any = MODELS[family]()
    whole = getattr(whole, "vision_model", whole)
    own = Normalisation.of(make_image_processor())
    return VisionEncoder(whole, normalisation=own, runs_at=Grid(SIDE[family], whole.config.patch_size), **tap)


@cache
def llm_of(family: str) -> Any:
    window = {"sliding_window": WINDOW} if "sliding_window" in LLM_CONFIGS[family][1] else {}
    return make_llm(family, ATTENTION.get(family, "sdpa"), **window)


@cache
def shared_processor(side: int, visual_tokens: int) -> Processor:
    images = CLIPImageProcessor(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    return Processor(make_tokenizer(), images, visual_tokens)


@cache
def shared_examples(side: int, visual_tokens: int) -> tuple[Example, ...]:
    processor = shared_processor(side, visual_tokens)
    return tuple(processor(make_sample(seed, images)) for seed, images in ((1, 1), (2, 0), (3, 2)))


# ---------------------------------------------------------------- who loads it


@cache
def answers(cell: Cell) -> tuple[Answer, Answer]:
    """Of transformers' stock classes (which), and of llama.cpp: yes, or the reasons that `mllm info` gives in one
    sentence, one by one."""
    model = cell.model()
    home, (runs, told) = find_home(model), in_llama_cpp(model)
    why = [] if home.is_stock else home.why.split("; ")
    why_not = [*llm.obstacles(model.llm), *vision.obstacles(model)]
    assert runs if not why_not else told == "; ".join(why_not)
    stock = Answer(home.architecture.removesuffix("ForConditionalGeneration"), frozenset(why))
    return stock, Answer("yes" if runs else "", frozenset(why_not))


def page() -> str:
    """Both answers for every cell, as Markdown."""
    stock, gguf = ({cell: answers(cell)[who] for cell in PLAIN + VARIED} for who in (0, 1))
    return (
        f"**A stock class of transformers** holds {yes(stock)}; a name stands for its `ForConditionalGeneration`. A\n"
        f"number is a reason below why there is none; such a cell is exported as remote code.\n\n{grids.draw(stock)}\n"
        f"**llama.cpp** runs {yes(gguf)}.\n\n{grids.draw(gguf)}"
    )


def yes(answers: dict[Cell, Answer]) -> str:
    return f"{sum(bool(answer.yes) for answer in answers.values())} of {len(answers)} cells"


def main() -> None:
    before, _, rest = README.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    README.write_text(before + BEGIN + page() + END + after)


if __name__ == "__main__":
    main()
