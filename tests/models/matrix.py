"""Every family of encoders, every connector, every family of LLMs: a tiny random model of each cell, and who loads it.

Enters: nothing. Leaves: models for `test_matrix.py`, and the table between two marks of `recipes/README.md`.

    python tests/models/matrix.py

The table has no row a cell: what stands in the way of a stock class or of llama.cpp is the encoder's, the connector's
or the LLM's alone, which the test holds against the model of each cell.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import cache
from math import isqrt
from pathlib import Path
from typing import Any, get_args

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

import torch
from test_encoders import MODELS
from transformers import CLIPImageProcessor

from conftest import LLM_CONFIGS, make_image_processor, make_llm, make_processor, make_tokenizer
from mllm.data.processor import Processor
from mllm.export.gguf import llm, vision
from mllm.export.homes import connector_obstacles, encoder_obstacles, find_home, head_obstacles
from mllm.models.connectors import ConnectorConfig
from mllm.models.multimodal import MultimodalLM
from mllm.models.vision_encoder import VisionEncoder
from mllm.oracle import in_llama_cpp
from mllm.types import Normalisation

README = Path(__file__).parents[2] / "recipes" / "README.md"
BEGIN, END = "<!-- matrix -->\n", "<!-- /matrix -->"
KINDS = {kind.__dataclass_fields__["type"].default: kind for kind in get_args(get_args(ConnectorConfig)[0])}
SMALL = {"hidden_size": 16, "num_layers": 2, "num_heads": 2, "num_queries": 3, "tokens": 4, "depth": 2}
ENCODERS, CONNECTORS, LLMS = list(MODELS), list(KINDS), list(LLM_CONFIGS)
ATTENTION = {"gemma2": "eager"}
"""Gemma 2 caps its attention scores, which sdpa cannot."""
WINDOW = 48
"""Wider than a sample, so that its answer sees its image; narrower than a row."""
PARTS = ("encoder", "connector", "llm")
PLAIN = ("siglip", "mlp", "llama")
"""A cell with nothing in the way: what another one meets is the part's that differs."""


@dataclass(frozen=True)
class Cell:
    encoder: str
    connector: str
    llm: str

    def model(self, seed: int = 0) -> MultimodalLM:
        """All three parts, random, nothing frozen."""
        torch.manual_seed(seed)
        whole: Any = MODELS[self.encoder]()
        whole = getattr(whole, "vision_model", whole)
        encoder = VisionEncoder(whole, normalisation=Normalisation.of(make_image_processor()))
        window = {"sliding_window": WINDOW} if "sliding_window" in LLM_CONFIGS[self.llm][1] else {}
        words = make_llm(self.llm, ATTENTION.get(self.llm, "sdpa"), seed, **window)
        torch.manual_seed(seed + 1)
        patches = encoder.num_patches
        connector = connector_config(self.connector, patches).build(encoder.width, words.config.hidden_size, patches)
        return MultimodalLM(encoder, connector, words, make_processor().image_token_id)

    def processor(self, encoder: VisionEncoder) -> Processor:
        """Images of the side, and visual tokens of the number, that the cell asks for."""
        side, patches = encoder.grid.side, encoder.num_patches
        images = CLIPImageProcessor(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
        return Processor(make_tokenizer(), images, connector_config(self.connector, patches).num_tokens(patches))


def connector_config(name: str, patches: int) -> Any:
    """A small one, for any square number of patches."""
    side = isqrt(patches)
    sizes = {**SMALL, "factor": 2 if side % 2 == 0 else side}
    fields = KINDS[name].__dataclass_fields__
    return KINDS[name](**{field: value for field, value in sizes.items() if field in fields})


@dataclass(frozen=True)
class Verdict:
    """Reasons that stand in the way; none where nothing does."""

    stock: frozenset[str]
    llama_cpp: frozenset[str]


def verdict(model: MultimodalLM) -> Verdict:
    """The reasons that `mllm info` gives in one sentence, one by one."""
    stock = [*connector_obstacles(model), *encoder_obstacles(model), *head_obstacles(model.llm)]
    home, llama_cpp = find_home(model), [*llm.obstacles(model.llm), *vision.obstacles(model)]
    assert home.is_stock if not stock else home.why == "; ".join(stock)
    loads, why = in_llama_cpp(model)
    assert loads if not llama_cpp else why == "; ".join(llama_cpp)
    return Verdict(frozenset(stock), frozenset(llama_cpp))


@cache
def verdicts() -> dict[tuple[str, str], Verdict]:
    """(part, family) -> what it alone brings into an otherwise plain cell."""
    plain = dict(zip(PARTS, PLAIN, strict=True))
    return {
        (part, family): verdict(Cell(**{**plain, part: family}).model())
        for part, families in zip(PARTS, (ENCODERS, CONNECTORS, LLMS), strict=True)
        for family in families
    }


def table() -> str:
    """Markdown, a row a family."""
    rows = ["| part | family | a stock transformers class | llama.cpp |", "|---|---|---|---|"]
    for (part, family), found in verdicts().items():
        answers = [f"no: {'; '.join(sorted(why))}" if why else "yes" for why in (found.stock, found.llama_cpp)]
        rows.append(f"| {part.replace('_', ' ')} | `{family}` | {' | '.join(answers)} |")
    return "\n".join(rows) + "\n"


def main() -> None:
    before, _, rest = README.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    README.write_text(before + BEGIN + table() + END + after)


if __name__ == "__main__":
    main()
