"""The loader gives the same batches however it is asked, and what cannot be read shifts nothing."""

from __future__ import annotations

import json
import pickle
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import make_processor, write_llava
from indexing import ROW, index_of
from mllm.data.formats.llava import LlavaSource
from mllm.data.index import Index, build_index
from mllm.data.loader import DataConfig, PlannedBatches, Share, batches
from mllm.data.plan import Plan
from mllm.data.planning.mixture import MixtureConfig, SourceShare
from mllm.data.processor import Processor
from mllm.train.route import make_plan
from mllm.train.settings import TrainConfig
from mllm.types import IGNORE_INDEX, Batch, Fault

ROWS = 8
ONE_RANK = Share(rank=0, world_size=1, rows=4)


def plan_of(index: Index, rows_per_step: int = 4, seed: int = 1) -> Plan:
    return Plan.from_lengths(index.length, ROW, rows_per_step, seed)


def dataset_of(
    index: Index, share: Share = ONE_RANK, processor: Processor | None = None, **plan: int
) -> PlannedBatches:
    return PlannedBatches(index, plan_of(index, **plan), processor or make_processor(), share)


def assert_equal(one: Batch, other: Batch) -> None:
    assert one.keys() == other.keys()
    for key, value in one.items():
        assert torch.equal(value, other[key]) if isinstance(value, torch.Tensor) else value == other[key], key


def write_mixed(folder: Path, number: int, every: int = 4) -> Path:
    """Conversations of many lengths; one in `every` is about a picture."""
    path = write_llava(folder, -(-number // every), turns=1)
    pictures = json.loads(path.read_text())
    records = []
    for row in range(number):
        record = dict(pictures[row // every], id=f"m{row}")
        if row % every:
            words = "word " * (row * 7 % 19)
            asked = {"from": "human", "value": f"say {row} {words}"}
            record = {"id": f"m{row}", "conversations": [asked, {"from": "gpt", "value": f"{row * 3} {words}"}]}
        records.append(record)
    path.write_text(json.dumps(records))
    return path


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Index:
    """60 samples, about 16 rows of 160 tokens."""
    return index_of(write_mixed(tmp_path_factory.mktemp("mixed"), 60), make_processor())


@pytest.fixture(scope="module")
def quick() -> Processor:
    """What the properties read with: tokens and pixels are made once, for this is not what they test."""
    return make_processor(keep=True)


def rows_of(parts: list[Batch]) -> list[tuple[Any, ...]]:
    """Each row as plain numbers, without the padding that its neighbours make."""
    rows = []
    for batch in parts:
        length = [int((batch["position_ids"][row] > 0).nonzero().max()) + 1 for row in range(len(batch["input_ids"]))]
        for row, end in enumerate(length):
            cut = [batch[name][row, :end].tolist() for name in ("input_ids", "labels", "position_ids")]  # type: ignore[literal-required]
            rows.append((batch["sample_ids"][row], *cut))
    return rows


# ---------------------------------------------------------------- the same for whoever asks


@pytest.mark.parametrize("world", [1, 2, 4, 8])
@pytest.mark.parametrize("workers", [0, 1, 3])
def test_global_batches_are_the_same_for_any_number_of_ranks_and_workers(
    mixed: Index, quick: Processor, world: int, workers: int
) -> None:
    def step(world: int, rows: int, workers: int) -> list[tuple[Any, ...]]:
        shares = [dataset_of(mixed, Share(rank, world, rows), quick, rows_per_step=ROWS) for rank in range(world)]
        parts = [rows_of(list(batches(share, 1, 2, workers))) for share in shares]
        return [parts[row % world][row // world] for row in range(ROWS)]

    assert step(world, ROWS // world if world < 8 else 1, workers) == step(1, 1, 0)


@given(
    seed=st.integers(0, 3), start=st.integers(0, 9), world=st.sampled_from([1, 2, 4, 8]), rows=st.sampled_from([1, 2])
)
@settings(deadline=None, max_examples=15)
def test_the_next_fifty_packs_after_a_stop_are_byte_for_byte_the_same(
    mixed: Index, quick: Processor, seed: int, start: int, world: int, rows: int
) -> None:
    if world * rows > ROWS:
        rows = 1
    share = Share(world - 1, world, rows)
    steps = -(-50 // (ROWS // world))
    whole = dataset_of(mixed, share, quick, rows_per_step=ROWS, seed=seed)
    again = dataset_of(mixed, share, quick, rows_per_step=ROWS, seed=seed)
    uninterrupted = list(batches(whole, 0, start + steps, 0))[start * whole.accumulation :]
    resumed = list(batches(again, start, start + steps, 0))
    assert sum(len(batch["sample_ids"]) for batch in resumed) >= 50
    assert len(resumed) == len(uninterrupted)
    for one, other in zip(resumed, uninterrupted, strict=True):
        assert_equal(one, other)


@given(seed=st.integers(0, 99))
@settings(deadline=None, max_examples=10)
def test_each_sample_comes_exactly_once_an_epoch(mixed: Index, quick: Processor, seed: int) -> None:
    dataset = dataset_of(mixed, Share(0, 1, 1), quick, rows_per_step=1, seed=seed)
    steps = dataset.plan.steps(1)
    seen = Counter(name for batch in batches(dataset, 0, steps, 0) for row in batch["sample_ids"] for name in row)
    assert seen == Counter(mixed.ids.to_pylist())


def test_a_late_start_with_workers_gives_the_batches_of_an_early_one(mixed: Index, quick: Processor) -> None:
    early = list(batches(dataset_of(mixed, processor=quick), 0, 4, 0))
    late = list(batches(dataset_of(mixed, processor=quick), 2, 4, 2))
    assert len(late) == 2
    for one, other in zip(early[2:], late, strict=True):
        assert_equal(one, other)


def test_a_file_that_the_main_process_holds_open_serves_all_workers(mixed: Index, quick: Processor) -> None:
    """A worker that was forked shares the position of an open file."""
    for number in range(len(mixed)):
        mixed.sample(number)
    dataset = dataset_of(mixed)
    for one, other in zip(batches(dataset, 0, 8, 3), batches(dataset, 0, 8, 0), strict=True):
        assert_equal(one, other)


def test_rows_that_ranks_cannot_share_are_refused(mixed: Index) -> None:
    with pytest.raises(ValueError, match="rows_per_step 4 is no multiple of 3 ranks x 1"):
        dataset_of(mixed, Share(0, 3, 1))


def test_a_dataset_travels_to_workers_that_are_spawned_without_its_plan(mixed: Index) -> None:
    dataset = dataset_of(mixed)
    [rows] = dataset.items(3, 4)
    travelled = pickle.loads(pickle.dumps(dataset))
    assert travelled.plan is None
    assert_equal(travelled[rows], dataset[rows])


def test_a_batch_of_text_alone_holds_one_blank_image(tmp_path: Path, processor: Processor) -> None:
    path = write_mixed(tmp_path, 8)
    path.write_text(json.dumps([record for record in json.loads(path.read_text()) if "image" not in record]))
    [batch] = batches(dataset_of(index_of(path, processor)), 0, 1, 0)
    assert (batch["num_images"], batch["pixel_values"].shape) == (0, (1, *processor.pixel_shape))
    assert "attention_mask" not in batch


def test_kept_samples_are_read_once(tmp_path: Path, processor: Processor) -> None:
    path = write_llava(tmp_path, 6)
    kept = make_processor(keep=True)
    dataset, plain = dataset_of(index_of(path, processor), processor=kept), dataset_of(index_of(path, processor))
    first = [dataset.example(number) for number in range(6)]
    path.write_text("[]")
    (tmp_path / "images/2.png").unlink()
    for number, example in enumerate(first):
        again = dataset.example(number)
        assert (again.input_ids, again.labels, again.fault) == (example.input_ids, example.labels, None)
        assert torch.equal(again.pixel_values, example.pixel_values)
    assert plain.example(2).fault is not None


def test_the_mixture_of_the_settings_decides_what_is_drawn(tmp_path: Path, processor: Processor) -> None:
    sources = [LlavaSource(path=write_llava(tmp_path / name, 6)) for name in ("one", "two")]
    index = build_index(sources, processor, ROW, progress=False)
    data = DataConfig(mixture=MixtureConfig([SourceShare(repeat=2), SourceShare(repeat=0)]), seq_length=ROW)
    plan = make_plan(index, data, TrainConfig(output_dir=tmp_path / "out", rows_per_step=1))
    drawn = Counter(number for row in plan.epoch(0) for number in row)
    assert drawn == Counter(dict.fromkeys(range(6), 2))


# ---------------------------------------------------------------- holes


def test_one_in_a_hundred_broken_leaves_every_other_pack_as_it_was(tmp_path: Path, processor: Processor) -> None:
    index = index_of(write_mixed(tmp_path, 200), processor)
    steps = plan_of(index).steps(1)
    before = rows_of(list(batches(dataset_of(index), 0, steps, 0)))
    broken = {"m40": 10, "m160": 40}
    for image in broken.values():
        (tmp_path / f"images/{image}.png").write_bytes(b"broken")
    parts = list(batches(dataset_of(index), 0, steps, 2))
    after = rows_of(parts)
    assert {fault.id for part in parts for fault in part["faults"]} == set(broken)
    assert len(after) == len(before)
    hurt = 0
    for one, other in zip(before, after, strict=True):
        if set(one[0]) & set(broken):
            hurt += 1
            assert (one[0], one[3], len(one[1])) == (other[0], other[3], len(other[1]))
        else:
            assert one == other
    assert 1 <= hurt <= 2


def lose_image(folder: Path) -> None:
    (folder / "images/4.png").write_bytes(b"broken")


def lose_file(folder: Path) -> None:
    (folder / "data.json").write_text("")


def say_more(folder: Path) -> None:
    text = (folder / "data.json").read_text()
    (folder / "data.json").write_text(text.replace("it is 4", "it 4444"))


def say_nothing(folder: Path) -> None:
    text = (folder / "data.json").read_text()
    (folder / "data.json").write_text(text.replace('"conversations"', '"conversatiens"'))


LOSSES: dict[str, tuple[Callable[[Path], None], str, str]] = {
    "image": (lose_image, "image", "cannot read image"),
    "file": (lose_file, "record", "the file is shorter than when it was indexed"),
    "words": (say_more, "changed", "tokens, 37 when it was indexed: the file changed"),
    "record": (say_nothing, "record", "'conversations' is missing"),
}


@pytest.mark.parametrize("loss", LOSSES)
def test_a_sample_that_is_lost_becomes_a_hole_of_its_length(tmp_path: Path, processor: Processor, loss: str) -> None:
    lose, kind, words = LOSSES[loss]
    path = write_llava(tmp_path, 12)
    index = index_of(path, processor)
    before = dataset_of(index).example(4)
    lose(tmp_path)
    hole = dataset_of(index).example(4)
    assert (len(hole.input_ids), hole.id, hole.where) == (len(before.input_ids), "r4", f"{path}, row 4")
    assert set(hole.labels) == {IGNORE_INDEX}
    assert processor.image_token_id not in hole.input_ids
    assert len(hole.pixel_values) == 0
    assert isinstance(hole.fault, Fault)
    assert (hole.fault.kind, hole.fault.id, hole.fault.number) == (kind, "r4", 4)
    assert words in hole.fault.cause
    assert str(path) not in hole.fault.cause  # where it lies is told once


def test_a_hole_stands_in_the_batch_in_the_place_of_its_sample(tmp_path: Path, processor: Processor) -> None:
    index = index_of(write_llava(tmp_path, 12), processor)
    [before] = batches(dataset_of(index), 0, 1, num_workers=0)
    lose_image(tmp_path)
    [after] = batches(dataset_of(index), 0, 1, num_workers=0)
    [(row, place)] = [(r, ids.index("r4")) for r, ids in enumerate(before["sample_ids"]) if "r4" in ids]
    starts = (before["position_ids"][row] == 0).nonzero().flatten().tolist()
    hole = (row, slice(starts[place], starts[place] + int(index.length[4])))
    assert (after["labels"][hole] == IGNORE_INDEX).all()
    assert after["num_images"] == before["num_images"] - 1
    for batch in (before, after):
        batch["input_ids"][hole] = 0
        batch["labels"][hole] = IGNORE_INDEX
    for name in ("input_ids", "labels", "position_ids"):
        assert torch.equal(before[name], after[name])  # type: ignore[literal-required]
    assert before["sample_ids"] == after["sample_ids"]


def test_a_sample_too_long_for_a_row_is_cut_as_planned(tmp_path: Path, processor: Processor) -> None:
    index = index_of(write_llava(tmp_path, 6), processor, max_length=30)
    example = dataset_of(index).example(3)
    assert (len(example.input_ids), example.fault) == (30, None)


def test_workers_need_no_plan(mixed: Index, quick: Processor, monkeypatch: pytest.MonkeyPatch) -> None:
    """A million samples are planned once a rank, not once a worker."""
    dataset = dataset_of(mixed, processor=quick)
    items = list(dataset.items(0, 2))

    def refused(*_: object) -> Iterator[None]:
        raise AssertionError("a worker asked the plan")

    monkeypatch.setattr(Plan, "rows", refused)
    assert [len(dataset[item]["sample_ids"]) for item in items] == [4, 4]
