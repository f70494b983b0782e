"""The index knows all faults before the first step; the loader gives the same batches however it is asked."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from conftest import make_processor
from mllm.data.formats.llava import LlavaSource
from mllm.data.index import Index, build_index
from mllm.data.loader import PlannedBatches, Share, batches
from mllm.data.plan import Plan
from mllm.data.processor import Processor
from mllm.types import IGNORE_INDEX, Batch

ROW = 160
ONE_RANK = Share(rank=0, world_size=1, rows=4)


def spoil(path: Path) -> None:
    """Rows 1, 3 and 5 of a LLaVA file cannot be used, each for another reason."""
    records = json.loads(path.read_text())
    records[1]["image"] = "images/none.png"
    del records[3]["conversations"]
    records[5]["conversations"][0]["value"] = "no placeholder"
    path.write_text(json.dumps(records))


def index_of(path: Path, processor: Processor, max_length: int = ROW) -> Index:
    return build_index([LlavaSource(path=path)], processor, max_length, progress=False)


def dataset_of(index: Index, share: Share = ONE_RANK) -> PlannedBatches:
    return PlannedBatches(index, Plan(index.lengths, ROW, rows_per_step=4, seed=1), make_processor(), share)


def assert_equal(one: Batch, other: Batch) -> None:
    assert one.keys() == other.keys()
    for key, value in one.items():
        assert torch.equal(value, other[key]) if isinstance(value, torch.Tensor) else value == other[key], key


def test_faults_are_collected_with_file_and_row(llava_folder: Callable[..., Path], processor: Processor) -> None:
    spoil(path := llava_folder(8))
    index = index_of(path, processor)
    assert [sample.id for sample in index.samples] == ["r0", "r2", "r4", "r6", "r7"]
    assert [fault.partition(": ")[0] for fault in index.faults] == [f"{path}, row {row}" for row in (1, 3, 5)]
    told = ["no such file", "'conversations' is missing", "0 <image> placeholders but 1 images"]
    assert all(words in fault for words, fault in zip(told, index.faults, strict=True))
    assert (index.num_images, index.bad_share) == (5, 3 / 8)


def test_lengths_are_those_of_the_examples(llava_folder: Callable[..., Path], processor: Processor) -> None:
    index = index_of(llava_folder(6), processor)
    for sample, length, supervised in zip(index.samples, index.lengths, index.supervised, strict=True):
        example = processor(sample)
        assert (len(example.input_ids), sum(label != IGNORE_INDEX for label in example.labels)) == (length, supervised)


def test_samples_that_are_cut_are_counted(llava_folder: Callable[..., Path], processor: Processor) -> None:
    index = index_of(llava_folder(6), processor, max_length=30)
    assert (index.truncated, index.lengths) == (6, [30] * 6)


def test_samples_that_cannot_be_cut_are_faults(llava_folder: Callable[..., Path], processor: Processor) -> None:
    index = index_of(llava_folder(3), processor, max_length=4)
    assert len(index.faults) == 3
    assert all("raise data.seq_length" in fault for fault in index.faults)


def test_an_id_that_comes_again_is_told_apart(llava_folder: Callable[..., Path], processor: Processor) -> None:
    source = LlavaSource(path=llava_folder(2))
    ids = [[sample.id for sample in build_index([source, source], processor, ROW, False).samples] for _ in range(2)]
    assert ids == [["r0", "r1", "r0~1", "r1~1"]] * 2


def test_too_many_faults_stop_with_the_remedy(llava_folder: Callable[..., Path], processor: Processor) -> None:
    spoil(path := llava_folder(8))
    index = index_of(path, processor)
    with pytest.raises(ValueError, match=r"(?s)3 of 8 records .* raise data\.max_bad_share") as caught:
        index.check(0.37)
    assert index.faults[0] in str(caught.value)


def test_few_faults_go_on_and_are_written_down(llava_folder: Callable[..., Path], processor: Processor) -> None:
    spoil(path := llava_folder(8))
    index, quarantine = index_of(path, processor), path.parent / "quarantine.jsonl"
    index.check(0.375, quarantine)
    assert [json.loads(line)["fault"] for line in quarantine.read_text().splitlines()] == index.faults


def test_faults_are_written_down_before_the_run_stops(llava_folder: Callable[..., Path], processor: Processor) -> None:
    spoil(path := llava_folder(8))
    quarantine = path.parent / "quarantine.jsonl"
    with pytest.raises(ValueError, match="cannot be used"):
        index_of(path, processor).check(0.0, quarantine)
    assert len(quarantine.read_text().splitlines()) == 3


def test_data_without_a_fault_writes_no_quarantine(llava_folder: Callable[..., Path], processor: Processor) -> None:
    path = llava_folder(2)
    index_of(path, processor).check(0.0, path.parent / "quarantine.jsonl")
    assert not (path.parent / "quarantine.jsonl").exists()


@pytest.mark.parametrize("text", ["", "[]", "\n\n"])
def test_a_file_of_nothing_is_told(tmp_path: Path, processor: Processor, text: str) -> None:
    (tmp_path / "data.json").write_text(text)
    with pytest.raises(ValueError, match="hold no records"):
        index_of(tmp_path / "data.json", processor).check(1.0)


def test_an_image_that_turns_unreadable_becomes_a_hole_of_its_length(
    llava_folder: Callable[..., Path], processor: Processor
) -> None:
    path = llava_folder(12)
    index = index_of(path, processor)
    before = list(batches(dataset_of(index), 0, 1, num_workers=0))
    (path.parent / "images/4.png").write_bytes(b"broken")
    after = list(batches(dataset_of(index), 0, 1, num_workers=0))
    [(row, place)] = [(r, ids.index("r4")) for r, ids in enumerate(before[0]["sample_ids"]) if "r4" in ids]
    starts = (before[0]["position_ids"][row] == 0).nonzero().flatten().tolist()
    hole = (row, slice(starts[place], starts[place] + index.lengths[4]))
    assert (after[0]["labels"][hole] == IGNORE_INDEX).all()
    assert not (after[0]["input_ids"][hole] == processor.image_token_id).any()
    assert [fault.partition(":")[0] for fault in after[0]["faults"]] == [f"{path}, row 4"]
    assert after[0]["num_images"] == before[0]["num_images"] - 1
    for key in ("input_ids", "labels"):
        for batch in (before[0], after[0]):
            batch[key][hole] = 0
        assert torch.equal(before[0][key], after[0][key])
    assert torch.equal(before[0]["position_ids"], after[0]["position_ids"])
    assert before[0]["sample_ids"] == after[0]["sample_ids"]


def test_batches_are_the_same_for_any_number_of_workers(
    llava_folder: Callable[..., Path], processor: Processor
) -> None:
    dataset = dataset_of(index_of(llava_folder(12), processor))
    alone, helped = (list(batches(dataset, 0, 5, workers)) for workers in (0, 2))
    assert len(alone) == len(helped) == 5
    for one, other in zip(alone, helped, strict=True):
        assert_equal(one, other)


def test_a_late_start_gives_the_batches_of_an_early_one(
    llava_folder: Callable[..., Path], processor: Processor
) -> None:
    index = index_of(llava_folder(12), processor)
    early, late = list(batches(dataset_of(index), 0, 6, 0)), list(batches(dataset_of(index), 4, 6, 0))
    for one, other in zip(early[4:], late, strict=True):
        assert_equal(one, other)


@pytest.mark.parametrize(("world", "rows"), [(1, 1), (1, 2), (2, 1), (2, 2), (4, 1)])
def test_ranks_and_accumulation_share_the_same_rows(
    llava_folder: Callable[..., Path], processor: Processor, world: int, rows: int
) -> None:
    index = index_of(llava_folder(12), processor)
    [whole] = batches(dataset_of(index), 2, 3, 0)
    shares = [dataset_of(index, Share(rank, world, rows)) for rank in range(world)]
    parts = [part for share in shares for part in batches(share, 2, 3, 0)]
    assert sorted(ids for part in parts for ids in part["sample_ids"]) == sorted(whole["sample_ids"])
    assert sum(int((part["labels"] != IGNORE_INDEX).sum()) for part in parts) == int(
        (whole["labels"] != IGNORE_INDEX).sum()
    )
    assert sum(part["num_images"] for part in parts) == whole["num_images"]


def test_rows_that_ranks_cannot_share_are_refused(llava_folder: Callable[..., Path], processor: Processor) -> None:
    index = index_of(llava_folder(3), processor)
    with pytest.raises(ValueError, match="rows_per_step 4 is no multiple of 3 ranks x 1"):
        dataset_of(index, replace(ONE_RANK, world_size=3, rows=1))


def test_a_dataset_travels_to_workers_that_are_spawned(llava_folder: Callable[..., Path], processor: Processor) -> None:
    dataset = dataset_of(index_of(llava_folder(6), processor))
    assert_equal(pickle.loads(pickle.dumps(dataset))[3], dataset[3])


def test_a_batch_of_text_alone_holds_one_blank_image(llava_folder: Callable[..., Path], processor: Processor) -> None:
    path = llava_folder(4)
    records = json.loads(path.read_text())
    for record in records:
        del record["image"]
        record["conversations"][0]["value"] = "hello"
    path.write_text(json.dumps(records))
    [batch] = batches(dataset_of(index_of(path, processor)), 0, 1, 0)
    assert (batch["num_images"], batch["pixel_values"].shape) == (0, (1, *processor.pixel_shape))
    assert "attention_mask" not in batch
