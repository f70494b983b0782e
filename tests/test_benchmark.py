"""The benchmark runs, compares like with like, and writes what it promises."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from mllm.data.formats.llava import read_llava

RECIPES = Path(__file__).parents[1] / "recipes"
sys.path.append(str(RECIPES))

from benchmarks.clock import interleaved, rate, speed  # noqa: E402
from benchmarks.drawn import Drawn, draw  # noqa: E402
from benchmarks.mixes import MIXES  # noqa: E402
from benchmarks.packers import balanced_knapsack, first_fit_decreasing  # noqa: E402
from benchmarks.report import PACKERS  # noqa: E402
from benchmarks.ways import pixels_by_hand, plain, tokens_by_hand, webdataset  # noqa: E402

LENGTHS = st.lists(st.integers(1, 64), min_size=1, max_size=100)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Drawn:
    return draw(tmp_path_factory.mktemp("drawn"), 6)


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmark.py", *map(str, arguments)])
    runpy.run_path(str(RECIPES / "benchmark.py"), run_name="__main__")


def test_the_data_benchmark_writes_every_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "deep" / "out.json"
    run(monkeypatch, "data", "--json", path, "--samples", 6, "--repeats", 1, "--lengths", 1000)
    found = json.loads(path.read_text())
    ratios = ("loader_vs_plain", "loader_vs_webdataset", "index_vs_plain")
    assert all(found[name] > 0 for name in (*ratios, "packer_samples_per_s", "index_samples_per_s"))
    assert all(least <= found[name] <= greatest for name, (least, greatest) in found["ranges"].items())
    for way in ("fill", *(way for _, way in PACKERS)):
        assert len(found[way]) == len(MIXES)
        assert all(0 < fill <= 1 for fill in found[way].values())
    assert found["machine"]["cores"] >= 1


def test_a_number_below_one_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit, match="--repeats is 0: give a positive number"):
        run(monkeypatch, "data", "--repeats", 0)


@pytest.mark.parametrize("subject", ["data", "train", "chat", "peers"])
def test_a_place_that_cannot_be_written_is_refused_before_anything_is_measured(
    subject: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SystemExit, match=r"--json .* is a folder: name a file"):
        run(monkeypatch, subject, "--json", tmp_path)


def test_by_hand_the_same_pixels_and_tokens_are_made(drawn: Drawn) -> None:
    processor = drawn.processor
    for sample, record in zip(read_llava(drawn.json), json.loads(drawn.json.read_text()), strict=True):
        example = processor(sample)
        with Image.open(drawn.json.parent / record["image"]) as image:
            assert torch.equal(example.pixel_values[0], pixels_by_hand(image.convert("RGB")))
        placeholder, visual = processor.image_token_id, processor.num_visual_tokens
        tokens = tokens_by_hand(processor.tokenizer, record)
        wide = [token for one in tokens for token in [one] * (visual if one == placeholder else 1)]
        assert example.input_ids == wide


def test_each_way_goes_through_all_samples(drawn: Drawn) -> None:
    assert (plain(drawn)(), webdataset(drawn)()) == (6, 6)


def test_the_drawn_photographs_weigh_what_cocos_do(drawn: Drawn) -> None:
    assert 100_000 < drawn.image_bytes / drawn.samples < 200_000


@given(LENGTHS)
def test_first_fit_decreasing_is_that_of_the_book(lengths: list[int]) -> None:
    rows: list[int] = []
    for length in sorted(lengths, reverse=True):
        place = next((i for i, load in enumerate(rows) if load + length <= 64), len(rows))
        rows[place : place + 1] = [(rows[place] if place < len(rows) else 0) + length]
    assert first_fit_decreasing(lengths, 64) == len(rows)


@given(LENGTHS)
def test_a_balanced_knapsack_fills_at_most_one_row_a_sample(lengths: list[int]) -> None:
    assert -(-sum(lengths) // 64) <= balanced_knapsack(lengths, 64) <= len(lengths)


def test_a_balanced_knapsack_leaves_the_spare_rows_of_each_window_as_empty_as_the_others() -> None:
    assert balanced_knapsack([1] * 64 * 8 * 3, 64) == 3 * (8 + 5)


def test_ways_take_turns_that_turn_round() -> None:
    calls: list[str] = []
    ways: dict[str, Any] = {name: lambda name=name: calls.append(name) or 1 for name in "ab"}
    seconds = interleaved(ways, 2)
    assert "".join(calls) == "ab" + "ab" + "ba"
    assert {name: len(each) for name, each in seconds.items()} == {"a": 2, "b": 2}


def test_speed_is_the_median_of_neighbours() -> None:
    assert speed([1.0, 2.0, 4.0], [2.0, 2.0, 16.0]) == {"median": 2.0, "least": 1.0, "greatest": 4.0}
    assert rate([0.5, 0.25, 8.0]) == 2.0


def test_drawing_again_gives_the_same_bytes(drawn: Drawn, tmp_path: Path) -> None:
    again = draw(tmp_path, 6)
    assert again.json.read_bytes() == drawn.json.read_bytes()
    pictures = [np.asarray(Image.open(path.parent / "images" / "000003.jpg")) for path in (again.json, drawn.json)]
    assert np.array_equal(*pictures)
