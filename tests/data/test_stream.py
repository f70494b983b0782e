"""Streams: rows of what cannot be indexed; stopped anywhere, the same rows follow."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import islice
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mllm.data.packing import BUFFER, pack
from mllm.data.streams.plan import Feed, Item, Spot, StreamPlan

ROW = 64


class Listed:
    """A feed that ends; `asked` notes which rows were read or fetched."""

    def __init__(self, name: str, lengths: list[int]) -> None:
        self.name, self.lengths = name, lengths
        self.asked: list[int] = []

    def read(self, after: Spot | None) -> Iterator[Item]:
        return map(self.item, range(after.row + 1 if after else 0, len(self.lengths)))

    def fetch(self, spot: Spot) -> Item:
        return self.item(spot.row)

    def item(self, row: int) -> Item:
        self.asked.append(row)
        return Item(f"{self.name}/{row}", self.lengths[row], Spot(0, 0, 0, row))


def make_streams(lengths: list[list[int]]) -> list[Feed]:
    return [Listed("abc"[n], each) for n, each in enumerate(lengths)]


SOURCES = st.lists(st.lists(st.integers(1, ROW), max_size=200), min_size=1, max_size=3)


def placed(state: dict[str, Any]) -> dict[str, Any]:
    return {"step": 0, "holes": {}, **state}


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
    plan = StreamPlan(sources, ROW, 1, weights)
    rows = iter(plan)
    list(islice(rows, stop))
    state = json.loads(json.dumps(plan.state()))
    resumed = StreamPlan(sources, ROW, 1, weights).at(placed(state))
    assert resumed.state() == plan.state()
    assert list(islice(resumed, 50)) == list(islice(rows, 50))


def test_one_source_is_packed_like_a_list() -> None:
    lengths = [1 + n * 37 % ROW for n in range(500)]
    rows = [[item.spot.row for item in row] for row in StreamPlan(make_streams([lengths]), ROW)]
    assert rows == pack(lengths, ROW)


def test_without_packing_each_row_is_one_item_in_its_order() -> None:
    plan = StreamPlan(make_streams([[9, 3, 5, 7]]), ROW, 2, packing=False)
    assert [[item.id for item in row] for row in plan.items(0) + plan.items(1)] == [["a/0"], ["a/1"], ["a/2"], ["a/3"]]
    assert plan.counts(1) == {"samples": 2, "tokens": 12, "fill": round(12 / 14, 4)}


def test_steps_are_blocks_of_rows_and_are_forgotten_once_they_are_trained() -> None:
    lengths = [1 + n * 37 % ROW for n in range(500)]
    plan = StreamPlan(make_streams([lengths]), ROW, 4)
    for step in range(20):
        plan.items(step)
    assert [row for step in range(20) for row in plan.rows(step)] == pack(lengths, ROW)[:80]
    assert plan.counts(12)["samples"] == sum(map(len, plan.rows(12)))
    assert sorted(plan.made) == list(range(12, 20))


def test_a_position_is_that_of_its_step_however_far_was_read_ahead() -> None:
    sources = make_streams([[1 + n * 37 % ROW for n in range(500)]])
    plan = StreamPlan(sources, ROW, 4)
    rows = [plan.items(step) for step in range(20)]
    resumed = StreamPlan(sources, ROW, 4).at(json.loads(json.dumps(plan.position(7))))
    assert [resumed.items(step) for step in range(7, 20)] == rows[7:]


def test_an_epoch_of_a_stream_has_no_known_end() -> None:
    with pytest.raises(ValueError, match=r"set train\.steps"):
        StreamPlan(make_streams([[1]]), ROW).steps(1.0)


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


def test_resume_fetches_what_waits_and_nothing_else() -> None:
    feed = Listed("a", [1 + n * 37 % ROW for n in range(2000)])
    plan = StreamPlan([feed], ROW)
    list(islice(plan, 500))
    feed.asked.clear()
    plan.at(placed(plan.state()))
    assert feed.asked == [item.spot.row for _, item in plan.waiting.values()]
    assert len(feed.asked) <= BUFFER


def test_a_stream_that_changed_is_refused() -> None:
    plan = StreamPlan([Listed("a", [30, 20, 9] * 99)], ROW)
    list(islice(plan, 20))
    with pytest.raises(ValueError, match=r"stream 0 holds 'b/\d+' of \d+ tokens at \(.*\), .* saw 'a/\d+' of \d+"):
        StreamPlan([Listed("b", [30, 20, 9] * 99)], ROW).at(placed(plan.state()))
    with pytest.raises(ValueError, match="the checkpoint is of 1 streams, these are 2"):
        StreamPlan(make_streams([[1], [2]]), ROW).at(placed(plan.state()))


@pytest.mark.parametrize("weights", [[1.0], [1.0, 0.0]])
def test_weights_must_fit_the_streams(weights: list[float]) -> None:
    with pytest.raises(ValueError, match="give one above 0 for each"):
        StreamPlan(make_streams([[1], [2]]), ROW, 1, weights)


def test_an_item_longer_than_a_row_is_named() -> None:
    with pytest.raises(ValueError, match=r"a/1: an example of 65 tokens fits no row of 64: raise data\.seq_length"):
        list(StreamPlan(make_streams([[3, 65]]), ROW))
