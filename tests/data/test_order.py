"""Order: every record once a pass, wherever one begins to read; neighbours on disk near; ranks even."""

from __future__ import annotations

import time
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mllm.data.planning import order
from mllm.data.planning.order import Passes, dealt, hand_size, key_of, scramble, shuffled

SIZES = st.sampled_from([1, 2, 1023, 1024, 1025, 16 * 1024, 16 * 1024 + 1, 40_000])


@given(SIZES, st.integers(0, 9))
def test_each_pass_holds_every_record_once(count: int, key: int) -> None:
    records, passes = Passes(count, key).take(0, 3 * count)
    for number in range(3):
        assert sorted(records[passes == number].tolist()) == list(range(count))
    assert passes.tolist() == sorted(passes.tolist())


@given(SIZES, st.data())
def test_any_places_are_known_without_those_before(count: int, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, 2 * count))
    stop = data.draw(st.integers(start, min(3 * count, start + 5000)))
    records, passes = Passes(count, 7).take(0, 3 * count)
    part, numbers = Passes(count, 7).take(start, stop)
    assert part.tolist() == records[start:stop].tolist()
    assert numbers.tolist() == passes[start:stop].tolist()


def test_passes_and_keys_differ() -> None:
    first, second = Passes(500, 1).take(0, 1000)[0].reshape(2, -1)
    other = Passes(500, 2).take(0, 500)[0]
    assert len({tuple(each.tolist()) for each in (first, second, other)}) == 3


def test_a_shuffled_group_comes_from_few_blocks_all_over_the_source() -> None:
    blocks = Passes(1_000_000, 3).take(0, order.BLOCK * order.TOGETHER)[0] // order.BLOCK
    assert len(np.unique(blocks)) == order.TOGETHER
    assert np.ptp(blocks) > 300
    assert len(np.unique(blocks[:200])) == order.TOGETHER  # and is mixed well


def test_the_time_of_a_place_does_not_grow_with_the_source() -> None:
    def seconds(count: int) -> float:
        passes, start = Passes(count, 3), time.process_time()
        for place in range(0, 20 * 16_384, 16_384):
            passes.take(place % (count - 100), place % (count - 100) + 100)
        return time.process_time() - start

    seconds(20_000)
    assert seconds(2_000_000) < 5 * seconds(20_000) + 0.05


def test_shuffles_are_fair() -> None:
    places = np.array([shuffled(8, key_of(5, n)) for n in range(4000)])
    seen = np.array([np.bincount(column, minlength=8) for column in places.T])
    assert ((seen - 500) ** 2 / 500).sum() < 85.4  # chi-square, 49 degrees, 0.1 %


def test_bits_are_those_of_splitmix64() -> None:
    """The first outputs for the seed 1234567, as Java's SplittableRandom and others publish them."""
    golden = 0x9E3779B97F4A7C15
    outputs = scramble(1234567 + golden, np.arange(3)).tolist()
    assert outputs == [6457827717110365317, 3203168211198807973, 9817491932198370423]


def test_keys_differ_for_different_facts() -> None:
    keys = [key_of(), key_of(0), key_of(0, 0), key_of(1), key_of(-1), key_of(1, 2), key_of(2, 1), key_of(2**70)]
    assert len(set(keys)) == len(keys)


@pytest.mark.parametrize(
    ("rows_per_step", "hand"), [(1, 1), (7, 7), (8, 8), (12, 12), (13, 13), (24, 8), (32, 8), (64, 16), (256, 64)]
)
def test_hands_divide_the_step(rows_per_step: int, hand: int) -> None:
    assert hand_size(rows_per_step) == hand


@given(st.lists(st.integers(0, 9), max_size=300), st.integers(0, 99), st.sampled_from([1, 5, 8, 16, 24]), st.integers())
def test_dealing_is_a_permutation(cost: list[int], first_row: int, rows_per_step: int, key: int) -> None:
    places = dealt(np.array(cost), first_row, rows_per_step, steps=2, key=key)
    assert sorted(places.tolist()) == list(range(len(cost)))


@pytest.mark.parametrize("first_row", [0, 3, 8, 21])
@pytest.mark.parametrize("steps", [1, 16])
def test_hands_stand_where_steps_and_ranks_expect_them(first_row: int, steps: int) -> None:
    cost = np.random.default_rng(0).permutation(400)
    ordered = cost[dealt(cost, first_row, rows_per_step=32, steps=steps, key=1)]
    ends = [0, *range(-first_row % 32, 400, 32 * steps), 400]
    for start, end in pairwise(ends):  # what is sorted together
        start += -(first_row + start) % 8
        hands = ordered[start : start + (end - start) // 8 * 8].reshape(-1, 8)
        inside = hands[np.argsort(hands.min(axis=1))]
        assert (inside.max(axis=1)[:-1] < inside.min(axis=1)[1:]).all()  # each hand is a run of the sorted costs


@given(st.integers(0, 40), st.integers(0, 9))
def test_with_steps_of_1_no_row_leaves_its_step(first_row: int, key: int) -> None:
    rows = first_row + np.arange(100)
    places = dealt(np.random.default_rng(key).integers(0, 99, 100), first_row, rows_per_step=16, steps=1, key=key)
    assert (rows[places] // 16 == rows // 16).all()


def test_rows_of_equal_cost_come_in_no_order() -> None:
    places = dealt(np.zeros(160), 0, rows_per_step=8, steps=16, key=1)
    assert places[:160].tolist() != list(range(160))


def test_steps_are_fair_samples_even_where_half_the_rows_have_no_image() -> None:
    image = np.random.default_rng(0).integers(0, 2, 4096)
    steps = image[dealt(image, 0, rows_per_step=64, steps=16, key=1)].reshape(-1, 64).mean(1)
    assert ((steps > 0) & (steps < 1)).mean() > 0.8
