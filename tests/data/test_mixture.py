"""Mixtures: exact shares in every window, no drift, caps that hold, and impossible settings refused."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from mllm.data.planning.mixture import Mixture, MixtureConfig, SourceShare, quotas

DRAWS = st.lists(st.integers(0, 400), min_size=1, max_size=9).filter(any)


def weights(*values: float, **others: Any) -> MixtureConfig:
    return MixtureConfig([SourceShare(weight=value) for value in values], **others)


def repeats(*values: float | None, **others: Any) -> MixtureConfig:
    return MixtureConfig([SourceShare(repeat=value) for value in values], **others)


@given(DRAWS, st.integers(1, 300))
@settings(max_examples=300, deadline=None)
def test_every_window_holds_exact_shares_and_nothing_drifts(draws: list[int], size: int) -> None:
    wanted, total = np.array(draws), sum(draws)
    before = quotas(wanted, size)
    inside = np.diff(before, axis=0)
    sizes = inside.sum(axis=1)
    assert before[-1].tolist() == draws
    assert (sizes[:-1] == size).all()
    assert 0 < sizes[-1] <= size
    # errors in units of 1 / total: below one sample in each window, and from the beginning to each window's end
    assert (np.abs(inside * total - wanted * sizes[:, None]) < total).all()
    assert (np.abs(before * total - wanted * before.sum(axis=1)[:, None]) < total).all()


def test_an_epoch_of_nothing_has_no_windows() -> None:
    assert quotas(np.array([0, 0]), 5).tolist() == [[0, 0]]


def test_quotas_of_a_hundred_million_samples_take_seconds() -> None:
    start = time.process_time()
    quotas(np.array([30_000_001, 69_000_000, 999_983, 16]), 8192)
    assert time.process_time() - start < 3


@given(st.lists(st.integers(0, 50), min_size=1, max_size=5).filter(any))
def test_by_default_an_epoch_is_every_record_once(sizes: list[int]) -> None:
    mixture = Mixture(sizes, MixtureConfig())
    assert [mixture.draws(epoch).tolist() for epoch in range(3)] == [sizes] * 3


def test_repeats_are_passes_an_epoch_and_fractions_add_up() -> None:
    mixture = Mixture([10, 3, 7], repeats(2, 0.1, None))
    assert mixture.draws(0).tolist() == [20, 0, 7]
    assert mixture.drawn(100).tolist() == [2000, 30, 700]


def test_weights_are_shares_of_as_many_records_as_the_sources_hold() -> None:
    assert Mixture([90, 30, 50], weights(1, 2, 0)).draws(0).tolist() == [40, 80, 0]


@given(st.lists(st.integers(1, 60), min_size=2, max_size=5), st.data())
def test_no_source_falls_behind_its_weight_over_epochs(sizes: list[int], data: st.DataObject) -> None:
    values = data.draw(st.lists(st.floats(0.01, 9), min_size=len(sizes), max_size=len(sizes)))
    mixture, total = Mixture(sizes, weights(*values)), sum(sizes)
    exact = np.array(values) / sum(values) * total * 50
    assert mixture.drawn(50).sum() == total * 50
    assert (np.abs(mixture.drawn(50) - exact) < len(sizes)).all()


@pytest.mark.parametrize(("temperature", "drawn"), [(1, [900, 100]), (2, [750, 250]), (1e9, [500, 500])])
def test_temperature_evens_out_natural_sizes(temperature: float, drawn: list[int]) -> None:
    assert Mixture([900, 100], MixtureConfig(temperature=temperature)).draws(0).tolist() == drawn


def test_temperature_evens_out_weights() -> None:
    assert Mixture([50, 50], weights(9, 1, temperature=2)).draws(0).tolist() == [75, 25]


@given(st.lists(st.tuples(st.integers(1, 40), st.floats(0.1, 5), st.floats(1, 4)), min_size=1, max_size=4))
def test_no_source_is_drawn_more_often_than_its_cap(sources: list[tuple[int, float, float]]) -> None:
    config = MixtureConfig([SourceShare(weight=weight, max_passes=cap) for _, weight, cap in sources])
    mixture, epoch = Mixture([size for size, _, _ in sources], config), 0
    while not mixture.exhausted(epoch):
        epoch += 1
        assert (mixture.drawn(epoch) <= [int(cap * size + 1e-9) for size, _, cap in sources]).all()
        assert mixture.draws(epoch - 1).sum() > 0


def test_what_a_capped_source_cannot_give_is_drawn_from_the_others() -> None:
    config = MixtureConfig([SourceShare(weight=1, max_passes=1), SourceShare(weight=1), SourceShare(weight=2)])
    mixture = Mixture([10, 45, 45], config)
    assert [mixture.draws(epoch).tolist() for epoch in range(2)] == [[10, 30, 60], [0, 33, 67]]


def test_with_repeats_a_capped_source_is_left_away() -> None:
    mixture = Mixture([10, 20], MixtureConfig([SourceShare(repeat=2, max_passes=3), SourceShare()]))
    assert [mixture.draws(epoch).tolist() for epoch in range(3)] == [[20, 20], [10, 20], [0, 20]]
    assert not mixture.exhausted(99)


def test_draws_are_the_same_in_any_order_of_asking() -> None:
    config = weights(1, 3.3, 0.2, temperature=1.7)
    late, straight = Mixture([9, 5, 70], config), Mixture([9, 5, 70], config)
    assert late.draws(7).tolist() == [straight.draws(epoch).tolist() for epoch in range(8)][7]


@pytest.mark.parametrize(
    ("sizes", "config", "message"),
    [
        ([5, 5], weights(1), r"1 shares for 2 data\.sources: give one for each source, or none"),
        ([5, 5], weights(0, 0), "every source that holds records has weight 0: give one of them a weight above 0"),
        ([5, 0], repeats(0, 1), "every source that holds records has repeat 0"),
        ([5, 0], weights(1, 2), r"data\.sources\.1 has weight 2 but no usable record: set it to 0"),
        ([5], MixtureConfig([SourceShare(weight=1, repeat=1)]), "not by both"),
        (
            [5, 5],
            MixtureConfig([SourceShare(repeat=2), SourceShare(weight=1)]),
            r"data\.sources\.1 has a weight and data\.sources\.0 a repeat: set the mixture by weights",
        ),
        ([5, 5], MixtureConfig([SourceShare(weight=1), SourceShare()]), r"data\.sources\.1 has no weight"),
        ([5, 5], MixtureConfig([SourceShare(max_passes=0.1)] * 2), "max_passes is less than one record"),
    ],
)
def test_impossible_settings_are_refused_with_the_remedy(sizes: list[int], config: MixtureConfig, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Mixture(sizes, config)


@pytest.mark.parametrize(
    "raw",
    [
        {"temperature": 0},
        {"temperature": float("inf")},
        {"shares": [{"weight": -1}]},
        {"shares": [{"repeat": float("nan")}]},
        {"shares": [{"max_passes": 0}]},
        {"shares": [{"wieght": 1}]},
    ],
)
def test_settings_out_of_range_are_refused_by_the_config(raw: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        TypeAdapter(MixtureConfig).validate_python(raw)
