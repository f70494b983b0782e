"""Packing: nothing lost, nothing too long, rows nearly full, nobody forgotten; and a row is its examples."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from conftest import make_sample
from mllm.data.packing import best_subset, join, pack
from mllm.data.processor import Processor
from mllm.types import IGNORE_INDEX

ROW = 64
LENGTHS = st.lists(st.integers(1, ROW), max_size=200)


def mix(number: int = 5000, seed: int = 0) -> list[int]:
    """Lengths like those of instruction data: many short answers, a long tail."""
    draws = torch.empty(number).log_normal_(5.5, 0.7, generator=torch.Generator().manual_seed(seed))
    return draws.round().long().clamp(16, 2048).tolist()


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


@pytest.mark.parametrize("seed", range(3))
def test_rows_of_varied_lengths_are_full(seed: int) -> None:
    lengths = mix(seed=seed)
    groups = pack(lengths, 2048)
    assert sum(lengths) / (len(groups) * 2048) >= 0.995


@pytest.mark.parametrize("seed", range(3))
def test_nobody_waits_more_than_256_places(seed: int) -> None:
    order = [position for group in pack(mix(seed=seed), 2048) for position in group]
    assert max(place - position for place, position in enumerate(order)) <= 256


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
