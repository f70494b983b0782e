"""Packing: nothing lost, nothing too long, rows nearly full, nobody forgotten; and a row is its examples."""

from __future__ import annotations

import time
from itertools import combinations, count, islice
from pathlib import Path
from runpy import run_path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from conftest import make_sample
from mllm.data.packing import BUFFER, HORIZON, best_subset, join, pack, packs
from mllm.data.processor import Processor
from mllm.types import IGNORE_INDEX

ROW = 64
LENGTHS = st.lists(st.integers(1, ROW), max_size=200)
DRAWN = run_path(str(Path(__file__).parents[2] / "recipes" / "benchmarks" / "mixes.py"))
MIXES, mix = DRAWN["MIXES"], DRAWN["mix"]
"""Those of the benchmark: what it claims is held here."""


@given(LENGTHS, st.integers(0, 70))
def test_every_position_stands_in_exactly_one_group(lengths: list[int], buffer: int) -> None:
    groups = pack(lengths, ROW, buffer)
    assert sorted(position for group in groups for position in group) == list(range(len(lengths)))


@given(LENGTHS)
def test_no_group_is_longer_than_a_row(lengths: list[int]) -> None:
    assert all(sum(lengths[p] for p in group) <= ROW for group in pack(lengths, ROW))


@given(LENGTHS)
def test_each_group_opens_with_the_oldest_that_waits(lengths: list[int]) -> None:
    waiting = list(range(len(lengths)))
    for group in pack(lengths, ROW):
        assert group[0] == waiting[0]
        assert group == sorted(group)
        waiting = [position for position in waiting if position not in group]


@given(st.lists(st.integers(1, 30), max_size=9), st.integers(0, 60))
def test_best_subset_equals_brute_force(lengths: list[int], room: int) -> None:
    chosen = best_subset(lengths, room)
    sums = [sum(c) for n in range(len(lengths) + 1) for c in combinations(lengths, n)]
    assert len(set(chosen)) == len(chosen)
    assert sum(lengths[i] for i in chosen) == max(total for total in sums if total <= room)


@given(st.lists(st.integers(1, 8), max_size=9), st.integers(0, 30))
def test_best_subset_prefers_the_older(lengths: list[int], room: int) -> None:
    chosen = best_subset(lengths, room)
    rivals = (list(c) for n in range(len(lengths) + 1) for c in combinations(range(len(lengths)), n))
    equal = [rival for rival in rivals if sum(lengths[i] for i in rival) == sum(lengths[i] for i in chosen)]
    assert chosen[::-1] == min(rival[::-1] for rival in equal)


@pytest.mark.parametrize(("name", "seq_length"), MIXES)
def test_one_window_of_varied_lengths_fills_its_rows(name: str, seq_length: int) -> None:
    lengths = mix(name)
    groups = pack(lengths, seq_length)
    assert sum(lengths) / (len(groups) * seq_length) >= 0.995


@pytest.mark.parametrize(("name", "seq_length"), MIXES)
def test_50_000_samples_are_packed_in_a_second(name: str, seq_length: int) -> None:
    lengths, seconds = mix(name), []
    for _ in range(3):
        start = time.process_time()
        pack(lengths, seq_length)
        seconds.append(time.process_time() - start)
    assert len(lengths) / min(seconds) >= 50_000


@pytest.mark.parametrize("seq_length", [1024, 4096, 16384])
def test_rows_of_hundreds_of_short_examples_are_filled_too(seq_length: int) -> None:
    lengths = np.random.default_rng(0).integers(20, 61, 20_000).tolist()
    groups = pack(lengths, seq_length)
    assert sum(lengths) / (len(groups) * seq_length) >= 0.99  # of 16,384 the last row alone is 1 % of the space
    assert latest(groups) <= HORIZON


def latest(groups: list[list[int]]) -> int:
    """The most places that an example stands behind its place of arrival."""
    order = [position for group in groups for position in group]
    return max((place - position for place, position in enumerate(order)), default=0)


@pytest.mark.parametrize(("name", "seq_length"), [*MIXES, ("captions 576", 4096)])
def test_nobody_waits_more_than_256_places(name: str, seq_length: int) -> None:
    assert latest(pack(mix(name), seq_length)) <= 256


@given(st.integers(2, BUFFER + 5), st.integers(ROW // 2, ROW - 1), st.lists(st.integers(1, 3), max_size=900))
def test_nobody_waits_more_than_256_places_behind_a_flood_of_shorter_ones(
    bulky: int, size: int, tiny: list[int]
) -> None:
    assert latest(pack([size] * bulky + tiny, ROW)) < HORIZON


def test_no_more_is_read_than_rows_need() -> None:
    read = count()
    rows = list(islice(packs((1 + next(read) % 7 for _ in count()), ROW), 3))
    assert next(read) <= sum(map(len, rows)) + BUFFER + 1


def test_lengths_may_be_numpy_integers() -> None:
    lengths = mix("native")
    assert pack(np.array(lengths, dtype=np.int32), 4096) == pack(lengths, 4096)


@pytest.mark.parametrize("lengths", [[], [ROW], [ROW] * 5, [1] * 1000])
def test_edge_cases_fill_their_rows(lengths: list[int]) -> None:
    assert len(pack(lengths, ROW)) == -(-sum(lengths) // ROW)


def test_an_example_longer_than_a_row_is_refused_with_the_remedy() -> None:
    with pytest.raises(ValueError, match=r"65 tokens fits no row of 64: raise data\.seq_length"):
        pack([3, 65], ROW)


def test_a_row_is_its_examples_side_by_side(processor: Processor) -> None:
    examples = [processor(make_sample(seed, num_images=images)) for seed, images in [(1, 2), (2, 0), (3, 1)]]
    row = join(examples, processor.pixel_shape)
    assert row.input_ids.tolist() == [token for example in examples for token in example.input_ids]
    assert row.position_ids.tolist() == [place for example in examples for place in range(len(example.input_ids))]
    assert torch.equal(row.pixel_values, torch.cat([example.pixel_values for example in examples]))
    assert row.sample_ids == ["sample-1", "sample-2", "sample-3"]


def test_the_first_label_of_each_example_is_ignored(processor: Processor) -> None:
    example = processor(make_sample(1))
    example.labels = list(example.input_ids)
    labels = join([example, example], processor.pixel_shape).labels.tolist()
    assert labels == [IGNORE_INDEX, *example.input_ids[1:]] * 2


def test_a_row_of_nothing_is_empty(processor: Processor) -> None:
    row = join([], processor.pixel_shape)
    assert (row.input_ids.numel(), row.pixel_values.shape) == (0, (0, *processor.pixel_shape))
