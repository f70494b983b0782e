"""Streams: rows of what cannot be indexed; stopped anywhere, the same rows follow."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import islice
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mllm.data.packing import HORIZON, pack
from mllm.data.stream import Item, Open, StreamPlan

ROW = 64


def stream(name: str, lengths: list[int], read: list[int] | None = None) -> Open:
    """A source that can only be read forward; `read` notes from where."""

    def items(start: int) -> Iterator[Item]:
        if read is not None:
            read.append(start)
        for place in range(start, len(lengths)):
            yield Item(f"{name}/{place}", lengths[place], sample=(name, place))

    return items


def make_streams(lengths: list[list[int]]) -> list[Open]:
    return [stream("abc"[n], each) for n, each in enumerate(lengths)]


SOURCES = st.lists(st.lists(st.integers(1, ROW), max_size=200), min_size=1, max_size=3)


@given(SOURCES)
@settings(deadline=None)
def test_every_item_stands_in_exactly_one_row(lengths: list[list[int]]) -> None:
    rows = list(StreamPlan(make_streams(lengths), ROW))
    assert sorted(item.id for row in rows for item in row) == sorted(
        f"{'abc'[n]}/{place}" for n, each in enumerate(lengths) for place in range(len(each))
    )
    assert all(sum(item.length for item in row) <= ROW for row in rows)


@given(SOURCES, st.integers(0, 60), st.lists(st.floats(0.1, 5), min_size=3, max_size=3))
@settings(deadline=None)
def test_after_a_stop_anywhere_the_same_50_rows_follow(
    lengths: list[list[int]], stop: int, weights: list[float]
) -> None:
    sources, weights = make_streams(lengths), weights[: len(lengths)]
    plan = StreamPlan(sources, ROW, weights)
    rows = iter(plan)
    list(islice(rows, stop))
    state = json.loads(json.dumps(plan.state()))
    resumed = StreamPlan(sources, ROW, weights).at(state)
    assert resumed.state() == plan.state()
    assert list(islice(resumed, 50)) == list(islice(rows, 50))


def test_one_source_is_packed_like_a_list() -> None:
    lengths = [1 + n * 37 % ROW for n in range(500)]
    rows = [[item.sample[1] for item in row] for row in StreamPlan(make_streams([lengths]), ROW)]
    assert rows == pack(lengths, ROW)


def test_sources_are_mixed_by_their_weights_until_they_end() -> None:
    plan = StreamPlan(make_streams([[ROW] * 300, [ROW] * 300, [ROW] * 10]), ROW, weights=[3, 1, 0.5])
    names = [row[0].id[0] for row in plan]
    for end in range(4, 81):
        assert abs(names[:end].count("a") - end * 3 / 4.5) <= 1
        assert abs(names[:end].count("b") - end * 1 / 4.5) <= 1
    assert len(names) == 610


def test_a_state_is_a_few_kb_without_samples() -> None:
    plan = StreamPlan(make_streams([[30, 20, 7] * 900] * 3), ROW)
    for _ in islice(plan, 700):
        assert len(json.dumps(plan.state())) < 4096


def test_resume_reads_no_more_than_256_items_again() -> None:
    read: list[int] = []
    lengths = [1 + n * 37 % ROW for n in range(2000)]
    plan = StreamPlan([stream("a", lengths, read)], ROW)
    list(islice(plan, 500))
    plan.at(plan.state())
    assert plan.taken[0] - HORIZON <= read[-1] <= plan.taken[0]


def test_a_stream_that_changed_is_refused() -> None:
    plan = StreamPlan([stream("a", [30, 20, 9] * 99)], ROW)
    list(islice(plan, 20))
    with pytest.raises(ValueError, match=r"stream 0 holds 'b/\d+' of \d+ tokens at place \d+, .* saw 'a/\d+' of \d+"):
        StreamPlan([stream("b", [30, 20, 9] * 99)], ROW).at(plan.state())
    with pytest.raises(ValueError, match=r"stream 0 holds nothing at place"):
        StreamPlan([stream("a", [])], ROW).at(plan.state())
    with pytest.raises(ValueError, match="the state is of 1 streams, these are 2"):
        StreamPlan(make_streams([[1], [2]]), ROW).at(plan.state())


@pytest.mark.parametrize("weights", [[1.0], [1.0, 0.0]])
def test_weights_must_fit_the_streams(weights: list[float]) -> None:
    with pytest.raises(ValueError, match="give one above 0 for each"):
        StreamPlan(make_streams([[1], [2]]), ROW, weights)


def test_an_item_longer_than_a_row_is_named() -> None:
    with pytest.raises(ValueError, match=r"a/1: an example of 65 tokens fits no row of 64: raise data\.seq_length"):
        list(StreamPlan(make_streams([[3, 65]]), ROW))


def test_samples_come_back_from_the_sources_on_resume() -> None:
    plan: Any = StreamPlan(make_streams([[5] * 200]), ROW)
    list(islice(plan, 3))
    assert all(item.sample == ("a", int(item.id[2:])) for row in plan.at(plan.state()) for item in row)
