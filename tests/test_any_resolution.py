"""How many visual tokens an image of any size becomes: as many as transformers' own processor counts."""

from __future__ import annotations

import random
from types import SimpleNamespace

import pytest
from transformers import LlavaNextProcessor

from mllm.any_resolution import AnyResolution
from mllm.data.imaging.tiling import LLAVA_NEXT, Tiling

SIX = tuple(Tiling("anyres", 28, 6).grids())
LAYOUTS = [
    AnyResolution(28, 2, tuple(LLAVA_NEXT)),
    AnyResolution(336, 24, tuple(LLAVA_NEXT)),
    AnyResolution(384, 27, SIX),
    AnyResolution(336, 12, SIX),
]
"""The tests' encoder; LLaVA-NeXT; SigLIP, whose patches leave a rest; pooled to a quarter."""


def sizes(count: int, largest: int = 12) -> list[tuple[int, int]]:
    draw = random.Random(0)
    return [(round(2 ** draw.uniform(0, largest)), round(2 ** draw.uniform(0, largest))) for _ in range(count)]


def stock_count(layout: AnyResolution, width: int, height: int) -> int:
    """What `LlavaNextProcessor` puts in the place of one image, its encoder having no class token."""
    pinpoints = [[rows * layout.side, columns * layout.side] for columns, rows in layout.grids]
    own = LlavaNextProcessor.__new__(LlavaNextProcessor)
    own.image_processor = SimpleNamespace(image_grid_pinpoints=pinpoints)
    own.patch_size, own.num_additional_image_tokens = layout.side // layout.across, 0
    return own._get_number_of_features(height, width, layout.side, layout.side)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: f"{layout.side}px-{layout.across}-{len(layout.grids)}")
def test_as_many_tokens_as_transformers_processor_counts_for_a_thousand_sizes(layout: AnyResolution) -> None:
    for width, height in [*sizes(1000), (1, 4000), (4000, 1), (layout.side, layout.side)]:
        assert layout.num_tokens(width, height) == stock_count(layout, width, height), (width, height)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: f"{layout.side}px-{layout.across}-{len(layout.grids)}")
def test_the_range_of_tokens_holds_all_sizes_and_its_ends_are_reached(layout: AnyResolution) -> None:
    exact = [(columns * layout.side, rows * layout.side) for columns, rows in layout.grids]
    counts = {layout.num_tokens(*size) for size in [*sizes(1000), *exact, (layout.across * 400, 1)]}
    assert (min(counts), max(counts)) == layout.range()
