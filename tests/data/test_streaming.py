"""Sources as streams: every sample once a pass, the same batches for everybody, nothing lost in silence."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import make_processor, write_llava
from mllm.data.formats.captions import CaptionsSource, Kinds
from mllm.data.formats.llava import LlavaSource
from mllm.data.formats.source import Filtered, Source
from mllm.data.indexing import tally
from mllm.data.loader import DataConfig, Share, batches
from mllm.data.planning.mixture import MixtureConfig, SourceShare
from mllm.data.processor import Processor
from mllm.data.streams.batches import LOOKED_AT, StreamedBatches, look, open_stream
from mllm.data.streams.plan import Item, StreamPlan
from mllm.data.streams.reader import Stream
from mllm.types import Fault
from writers import img2dataset, json_lines, parquet, png

ROW = 160
WORDS = "word " * 20


def said(row: int) -> dict[str, Any]:
    """A conversation without an image, of a length of its own."""
    asked = {"from": "human", "value": f"say {row} {WORDS[: row * 7 % 90]}"}
    return {"id": f"s{row}", "conversations": [asked, {"from": "gpt", "value": str(row * 3)}]}


def write(path: Path, rows: range) -> Path:
    path.write_text("".join(json.dumps(said(row)) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three files of 40, 7 and 13 conversations."""
    folder = tmp_path_factory.mktemp("text")
    return [
        write(folder / f"{name}.jsonl", range(*rows))
        for name, rows in (("a", (0, 40)), ("b", (40, 47)), ("c", (47, 60)))
    ]


def stream_of(*sources: Source, weights: list[float] | None = None, share: float = 1.0) -> Stream:
    mixture = MixtureConfig([SourceShare(weight=weight) for weight in weights or []])
    data = DataConfig(list(sources), mixture=mixture, seq_length=ROW, stream=True, max_bad_share=share)
    return open_stream(data, make_processor(), seed=0)


def plan_of(stream: Stream, rows_per_step: int = 4, packing: bool = True) -> StreamPlan:
    feeds, weights = stream.feeds()
    return StreamPlan(feeds, ROW, rows_per_step, weights, packing, stream.tally)


def items_of(plan: StreamPlan, steps: int) -> list[Item]:
    return [item for step in range(plan.next_step, plan.next_step + steps) for row in plan.items(step) for item in row]


def told(faults: list[Fault]) -> set[tuple[str, str, str]]:
    return {(fault.kind, fault.id, fault.where.rpartition("/")[2]) for fault in faults}


# ---------------------------------------------------------------- order


def test_every_sample_comes_once_a_pass_in_the_order_of_the_files(text: list[Path]) -> None:
    plan = plan_of(stream_of(*(LlavaSource(path=path) for path in text)), packing=False)
    assert [item.id for item in items_of(plan, 45)] == [f"s{row}" for row in range(60)] * 3


def test_packing_loses_and_repeats_no_sample(text: list[Path]) -> None:
    items = items_of(plan_of(stream_of(LlavaSource(path=text[0].parent))), 30)
    counts = Counter((item.spot.turn, item.id) for item in items)
    turns = max(turn for turn, _ in counts)
    assert turns >= 2
    assert {name: counts[name] for name in counts if name[0] < turns - 1} == {
        (turn, f"s{row}"): 1 for turn in range(turns - 1) for row in range(60)
    }


def test_weights_mix_sources_each_of_which_starts_again_by_itself(text: list[Path]) -> None:
    plan = plan_of(stream_of(*(LlavaSource(path=path) for path in text), weights=[1, 2, 0]), packing=False)
    items = items_of(plan, 15)
    assert Counter(item.spot.source for item in items) == {0: 20, 1: 40}
    assert [item.id for item in items if item.spot.source == 1] == ([f"s{row}" for row in range(40, 47)] * 6)[:40]


def test_one_kind_of_caption_is_drawn_a_pass_by_its_weight(tmp_path: Path) -> None:
    path = tmp_path / "captions.jsonl"
    json_lines(path, [{"id": f"c{n}", "image": "x.png", "alt": "a", "dense": "b"} for n in range(60)])
    source = CaptionsSource(path=path, text=Kinds({"alt": 3, "dense": 1}))
    plan = plan_of(stream_of(source), packing=False)
    items = items_of(plan, 60)
    drawn = [[item.id for item in items if item.spot.turn == turn] for turn in range(4)]
    assert all([name.partition("#")[0] for name in each] == [f"c{n}" for n in range(60)] for each in drawn)
    assert len({tuple(each) for each in drawn}) == 4
    assert 0.65 < sum(name.endswith("#alt") for each in drawn for name in each) / 240 < 0.85


# ---------------------------------------------------------------- batches


def micro_batches(path: Path, share: Share, workers: int = 0, steps: int = 4) -> list[Any]:
    stream = stream_of(LlavaSource(path=path))
    dataset = StreamedBatches(plan_of(stream), stream.processor, share)
    return list(batches(dataset, 0, steps, workers))


def same(one: Any, other: Any) -> bool:
    return all(
        torch.equal(value, other[key]) if isinstance(value, torch.Tensor) else value == other[key]
        for key, value in one.items()
    )


def test_batches_are_the_same_for_any_number_of_workers(tmp_path: Path) -> None:
    path, share = write_llava(tmp_path, 20), Share(0, 1, 2)
    here, there = micro_batches(path, share), micro_batches(path, share, workers=2)
    assert len(here) == len(there) == 8
    assert all(same(one, other) for one, other in zip(here, there, strict=True))


def test_two_ranks_together_have_the_rows_of_one(tmp_path: Path) -> None:
    path = write_llava(tmp_path, 20)
    whole = micro_batches(path, Share(0, 1, 1))
    parts = [micro_batches(path, Share(rank, 2, 1)) for rank in range(2)]
    dealt = [batch for both in zip(*parts, strict=True) for batch in both]
    assert len(dealt) == len(whole) == 16
    assert all(same(one, other) for one, other in zip(whole, dealt, strict=True))


def test_an_image_that_cannot_be_opened_is_a_hole_and_shifts_nothing(tmp_path: Path) -> None:
    path, share = write_llava(tmp_path, 20), Share(0, 1, 4)
    good = micro_batches(path, share)
    (tmp_path / "images" / "3.png").write_bytes(b"broken")
    holed = micro_batches(path, share)
    assert [batch["sample_ids"] for batch in good] == [batch["sample_ids"] for batch in holed]
    faults = [fault for batch in holed for fault in batch["faults"]]
    assert told(faults) == {("image", "r3", "data.json, row 3")}
    assert all("cannot read image" in fault.cause and fault.number >= 0 for fault in faults)


# ---------------------------------------------------------------- resume

WRITERS: dict[str, Callable[[Path, list[str]], object]] = {
    "jsonl": lambda path, words: json_lines(path, [{"image": "x.png", "caption": each} for each in words]),
    "parquet": lambda path, words: parquet(path, [{"image": png(), "caption": each} for each in words]),
    "tar": img2dataset,
}


@pytest.mark.parametrize("kind", WRITERS)
def test_after_a_stop_at_any_step_the_same_items_follow(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"0.{kind}"
    WRITERS[kind](path, [WORDS[:n] for n in range(1, 50)])
    sources = [CaptionsSource(path=path), LlavaSource(path=write(tmp_path / "t.jsonl", range(20)))]
    for weights in (None, [1.0, 2.0]):
        plan = plan_of(stream_of(*sources, weights=weights))
        rows = {step: plan.items(step) for step in range(16)}
        for stop in (1, 2, 5, 9, 15):
            state = json.dumps(plan.position(stop))
            assert len(state) < 10_000
            resumed = plan_of(stream_of(*sources, weights=weights)).at(json.loads(state))
            assert all(resumed.items(step) == rows[step] for step in range(stop, 16))
            assert resumed.tally == plan.tally


def test_a_resume_tokenises_what_waits_and_what_is_new(text: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    source = LlavaSource(path=text[0].parent)
    plan = plan_of(stream_of(source))
    items_of(plan, 6)
    state, encoded = plan.position(6), []
    encode = Processor.encode
    monkeypatch.setattr(Processor, "encode", lambda *given: encoded.append(given[1].id) or encode(*given))
    resumed = plan_of(stream_of(source)).at(state)
    assert encoded == [item.id for _, item in resumed.waiting.values()]


def test_streams_of_other_files_or_settings_have_other_fingerprints(tmp_path: Path) -> None:
    names = set()
    for folder, rows in (("a", 20), ("b", 20), ("c", 21)):
        (tmp_path / folder).mkdir()
        names.add(stream_of(LlavaSource(path=write(tmp_path / folder / "t.jsonl", range(rows)))).fingerprint())
    assert len(names) == 2  # a and b hold the same
    source = LlavaSource(path=tmp_path / "a" / "t.jsonl")
    names |= {stream_of(source, weights=[1.0]).fingerprint(), stream_of(source, source).fingerprint()}
    assert len(names) == 4


# ---------------------------------------------------------------- nothing is lost in silence


def spoiled(path: Path, every: int, count: int = 60) -> LlavaSource:
    """Of `every` records one cannot be read, and one says <image> without having one."""
    lines = [json.dumps(said(row)) for row in range(count)]
    for row in range(0, count, every):
        lines[row] = "{broken"
        lines[row + 1] = json.dumps(said(row + 1)).replace("say", "<image>")
    path.write_text("\n".join(lines))
    return LlavaSource(path=path)


def test_bad_records_are_named_counted_and_left_out(tmp_path: Path) -> None:
    stream = stream_of(spoiled(tmp_path / "t.jsonl", every=20))
    faults: list[Fault] = []
    stream.tell = faults.extend
    plan = plan_of(stream, packing=False)
    items = items_of(plan, 10)
    assert {item.spot.turn for item in items} == {0}
    assert {row for row in range(44) if f"s{row}" not in {item.id for item in items}} == {0, 1, 20, 21, 40, 41}
    assert told(faults) == {("record", "", f"t.jsonl, row {row}") for row in (0, 20, 40)} | {
        ("record", "", f"t.jsonl, row {row}") for row in (1, 21, 41)
    }
    assert (stream.tally.read, stream.tally.skipped, stream.tally.waiting) == (46, {"record": 6}, 0)
    assert stream.tally.summary()["used"] == 40


def test_long_samples_are_cut_and_counted_and_named_where_nothing_would_be_left(tmp_path: Path) -> None:
    long, endless = said(1), said(2)
    long["conversations"][1]["value"] = "word " * ROW
    endless["conversations"][0]["value"] = "word " * ROW
    json_lines(tmp_path / "t.jsonl", [said(0), long, endless])
    stream = stream_of(LlavaSource(path=tmp_path / "t.jsonl"))
    faults: list[Fault] = []
    stream.tell = faults.extend
    assert [item.length == ROW for item in items_of(plan_of(stream, 3, packing=False), 1)] == [False, True, False]
    assert told(faults) == {("length", "s2", "t.jsonl, row 2")}
    assert (stream.tally.truncated, stream.tally.tokens_cut > 0, stream.tally.skipped) == (1, True, {"length": 1})


def test_what_a_rule_leaves_out_is_counted_by_its_cause_and_no_fault(text: list[Path]) -> None:
    class Even(LlavaSource):
        def samples(self, record: Any, origin: Any) -> Any:
            if int(record["id"][1:]) % 2:
                raise Filtered("odd")
            return super().samples(record, origin)

    stream = stream_of(Even(path=text[0]), share=0.0)
    items_of(plan_of(stream, packing=False), 5)
    assert stream.tally.summary() == {
        "read": 39,
        "used": 20,
        "skipped": {"filtered": 19},
        "filtered": {"odd": 19},
        "truncated": {"samples": 0, "tokens": 0},
        "waiting": 0,
    }


def test_more_bad_ones_than_allowed_stop_the_stream_once_enough_were_read(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(tally, "SETTLED", 30)
    source = spoiled(tmp_path / "t.jsonl", every=20)
    items_of(plan_of(stream_of(source, share=0.2)), 20)
    stream = stream_of(source, share=0.05)
    with pytest.raises(ValueError, match=r"(?s)12.20% of the 41 records.*allows 5\.0%.*t\.jsonl, row 40.*Mend"):
        items_of(plan_of(stream), 20)


def test_a_hundred_bad_ones_in_a_row_stop_the_stream_whatever_share_is_allowed(tmp_path: Path) -> None:
    lines = [json.dumps(said(row)) for row in range(10)] + ["{broken"] * 100
    (tmp_path / "t.jsonl").write_text("\n".join(lines))
    with pytest.raises(ValueError, match=r"100 records one after the other cannot be used"):
        items_of(plan_of(stream_of(LlavaSource(path=tmp_path / "t.jsonl"))), 20)
    (tmp_path / "t.jsonl").write_text("\n".join(lines[:-1]))
    items_of(plan_of(stream_of(LlavaSource(path=tmp_path / "t.jsonl"))), 20)


def test_a_pass_without_any_sample_is_no_endless_loop(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text("{broken\n" * 3)
    with pytest.raises(ValueError, match=r"(?s)a whole pass over .*t\.jsonl gives no sample, 3 records read.*row 2"):
        items_of(plan_of(stream_of(LlavaSource(path=tmp_path / "t.jsonl"))), 1)


# ---------------------------------------------------------------- what is known beforehand, and what is refused


def test_a_look_at_the_first_samples_counts_and_tells_nothing(text: list[Path]) -> None:
    stream = stream_of(*(LlavaSource(path=path) for path in text))
    known = look(stream)
    assert [item.id for item in known.items] == [f"s{row}" for row in range(60)]
    assert len(known.length) == 60 < LOOKED_AT
    assert (known.supervised > 0).all()
    assert stream.tally.read == 0


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"keep_in_memory": True}, "keep_in_memory is for small sets"),
        ({"mixture": MixtureConfig([SourceShare(repeat=2.0)])}, "mixes by weights alone"),
        ({"mixture": MixtureConfig([SourceShare(weight=1, max_passes=2.0)])}, "mixes by weights alone"),
        ({"mixture": MixtureConfig(temperature=2.0)}, "mixes by weights alone"),
        ({"mixture": MixtureConfig([SourceShare(weight=0.0)])}, "1 weights for 1 data.sources"),
        ({"mixture": MixtureConfig([SourceShare(weight=1.0)] * 2)}, "2 entries for 1 sources"),
    ],
)
def test_settings_that_mean_nothing_in_a_stream_are_refused(text: list[Path], changes: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        open_stream(DataConfig([LlavaSource(path=text[0])], **changes), make_processor(), seed=0)
