"""The index knows every sample and all faults before the first step, in columns."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import write_llava
from indexing import ROW, contents, ids, index_of, spoil
from mllm.data.formats.captions import CaptionsSource
from mllm.data.formats.llava import LlavaSource
from mllm.data.formats.record import Filtered
from mllm.data.index import assemble, build_index
from mllm.data.indexing import jobs as index_jobs
from mllm.data.indexing import measure
from mllm.data.indexing.columns import told_apart
from mllm.data.processor import Processor
from mllm.types import IGNORE_INDEX


def test_faults_are_collected_with_file_and_row(llava_folder: Callable[..., Path], processor: Processor) -> None:
    path = spoil(llava_folder(8))
    index = index_of(path, processor)
    assert ids(index) == ["r0", "r2", "r4", "r6", "r7"]
    assert [fault.where for fault in index.faults] == [f"{path}, row {row}" for row in (1, 3, 5)]
    told = ["no such file", "'conversations' is missing", "0 <image> placeholders but 1 images"]
    assert all(words in fault.cause for words, fault in zip(told, index.faults, strict=True))
    assert [(fault.kind, fault.id) for fault in index.faults] == [("image", "r1"), ("record", ""), ("record", "")]
    assert (index.num_images, index.bad_share, index.read) == (5, 3 / 8, 8)


def test_counts_are_those_of_the_examples(llava_folder: Callable[..., Path], processor: Processor) -> None:
    index = index_of(llava_folder(6), processor)
    for number in range(len(index)):
        example = processor(index.sample(number))
        supervised = sum(label != IGNORE_INDEX for label in example.labels)
        assert (len(example.input_ids), supervised) == (index.length[number], index.supervised[number])
    assert index.images.tolist() == [1] * 6
    assert index.sizes.to_pylist() == [[32, 32]] * 6


def test_a_sample_comes_back_from_its_place(llava_folder: Callable[..., Path], processor: Processor) -> None:
    source = LlavaSource(path=spoil(llava_folder(8)))
    index = build_index([source], processor, ROW, progress=False)
    good = [sample for sample in source.read() if not isinstance(sample, ValueError) and sample.id != "r1"]
    assert [index.sample(number) for number in range(len(index))] == good
    assert [index.where(number) for number in range(len(index))] == [sample.where for sample in good]


def test_another_sample_in_a_place_is_told(llava_folder: Callable[..., Path], processor: Processor) -> None:
    path = llava_folder(3)
    index = index_of(path, processor)
    path.write_text(path.read_text().replace('"r1"', '"x1"'))
    with pytest.raises(ValueError, match=r"row 1: holds 'x1', held 'r1' when it was indexed: the file changed"):
        index.sample(1)


def test_samples_that_are_cut_are_counted(llava_folder: Callable[..., Path], processor: Processor) -> None:
    whole, cut = index_of(llava_folder(6), processor), index_of(llava_folder(6), processor, max_length=30)
    assert (cut.truncated.tolist(), cut.length.tolist()) == (list(range(6)), [30] * 6)
    assert cut.tokens_cut == whole.length.sum() - 6 * 30
    assert whole.tokens_cut == len(whole.truncated) == 0


def test_samples_that_cannot_be_cut_are_faults(llava_folder: Callable[..., Path], processor: Processor) -> None:
    index = index_of(llava_folder(3), processor, max_length=4)
    assert [fault.kind for fault in index.faults] == ["length"] * 3
    assert all("raise data.seq_length" in fault.cause for fault in index.faults)


# ---------------------------------------------------------------- ids, kinds, filters


def test_an_id_that_comes_again_is_told_apart(llava_folder: Callable[..., Path], processor: Processor) -> None:
    source = LlavaSource(path=llava_folder(2))
    index = build_index([source, source], processor, ROW, progress=False)
    assert ids(index) == ["r0", "r1", "r0~1", "r1~1"]
    assert index.sample(3).id == "r1~1"
    assert index.source.tolist() == [0, 0, 1, 1]


def test_a_fault_does_not_rename_the_samples_after_it(tmp_path: Path, processor: Processor) -> None:
    path = write_llava(tmp_path, 3)
    path.write_text(path.read_text().replace('"r0"', '"r"').replace('"r1"', '"r"').replace('"r2"', '"r"'))
    assert ids(index_of(path, processor)) == ["r", "r~1", "r~2"]
    (tmp_path / "images/1.png").write_bytes(b"broken")
    assert ids(index_of(path, processor)) == ["r", "r~2"]


NAMES = st.lists(st.sampled_from(["a", "b", "a~1", "a~2", "a~1~1", None]), max_size=12)


@given(NAMES, st.integers(1, 3))
@settings(deadline=None)
def test_names_are_told_apart_whatever_they_are(names: list[str | None], chunks: int) -> None:
    cut = [names[i::chunks] for i in range(chunks)]
    column = pa.chunked_array([pa.array(part, pa.string()) for part in cut])
    told, flat = told_apart(column).to_pylist(), [name for part in cut for name in part]
    named = [name for name in told if name is not None]
    assert len(set(named)) == len(named)
    assert [name is None for name in told] == [name is None for name in flat]
    assert all(new == old or new.startswith(f"{old}~") for new, old in zip(told, flat, strict=True) if old)
    first = {name: flat.index(name) for name in flat if name}
    assert all(told[at] == name for name, at in first.items())


@dataclass
class Kinds(CaptionsSource):
    """Captions of which one is used an epoch; those that say nothing of a dog are left out."""

    def kinds(self) -> dict[str, float]:
        return {"alt": 1.0, "dense": 3.0}

    def samples(self, record: Any, origin: Any) -> Iterator[Any]:
        if "dog" not in record["captions"][0]:
            raise Filtered("no dog")
        for sample, kind in zip(super().samples(record, origin), self.kinds(), strict=False):
            sample.variant = kind
            yield sample


def test_kinds_share_a_group_and_filters_are_no_faults(tmp_path: Path, processor: Processor) -> None:
    write_llava(tmp_path, 5)
    captions = [["a dog", "a brown dog"], ["a cat"], ["the dog"], ["dog", "dogs"], ["a bird"]]
    records = [{"image": f"images/{row}.png", "captions": each} for row, each in enumerate(captions)]
    path = tmp_path / "captions.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    kinds, plain = Kinds(path=path), CaptionsSource(path=path)
    index = build_index([kinds, plain], processor, ROW, progress=False)
    assert index.group[:5].tolist() == [0, 0, 1, 2, 2]
    assert index.weight[:5].tolist() == [1, 3, 1, 1, 3]
    assert index.group[5:].tolist() == list(range(3, 10))  # captions without kinds are samples of their own
    assert index.weight[5:].tolist() == [1] * 7
    assert (index.faults, dict(index.filtered), index.read) == ([], {"no dog": 2}, 14)
    index.check(0.0)


def test_filters_that_leave_nothing_are_named(tmp_path: Path, processor: Processor) -> None:
    path = tmp_path / "captions.jsonl"
    path.write_text(json.dumps({"image": "x.png", "captions": ["cat"]}) + "\n")
    with pytest.raises(ValueError, match=r"the filters leave out every sample \(1 x no dog\)"):
        build_index([Kinds(path=path)], processor, ROW, progress=False).check(1.0)


# ---------------------------------------------------------------- what stops a run


def test_too_many_faults_stop_with_the_remedy(llava_folder: Callable[..., Path], processor: Processor) -> None:
    index = index_of(spoil(llava_folder(8)), processor)
    index.check(0.375)
    with pytest.raises(ValueError, match=r"(?s)3 of 8 records .* raise data\.max_bad_share") as caught:
        index.check(0.37)
    assert str(index.faults[0]) in str(caught.value)
    assert "check.py PATH --json FILE names each" in str(caught.value)


@pytest.mark.parametrize("text", ["", "[]", "\n\n"])
def test_a_file_of_nothing_is_told(tmp_path: Path, processor: Processor, text: str) -> None:
    (tmp_path / "data.json").write_text(text)
    with pytest.raises(ValueError, match="hold no records"):
        index_of(tmp_path / "data.json", processor).check(1.0)


# ---------------------------------------------------------------- workers, size


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers also for small files, several to a file."""
    monkeypatch.setattr(index_jobs, "SMALL", 0)
    monkeypatch.setattr(index_jobs, "PART", 100)
    monkeypatch.setattr(measure, "BLOCK", 3)


@pytest.mark.usefixtures("eager")
def test_the_index_is_the_same_for_any_number_of_workers(tmp_path: Path, processor: Processor) -> None:
    paths = [spoil(write_llava(tmp_path / name, 20)) for name in ("one", "two")]
    sources = [LlavaSource(path=path) for path in [*paths, paths[0]]]
    folders = {workers: tmp_path / f"index{workers}" for workers in (0, 1, 2, 7)}
    alone, *helped = (
        build_index(sources, processor, 36, workers, folder, progress=False) for workers, folder in folders.items()
    )
    assert len(alone) == 51
    assert len(alone.faults) == 9
    for index in helped:
        assert contents(index) == contents(alone)
        assert index.fingerprint() == alone.fingerprint()
    stored = [{path.name: path.read_bytes() for path in folder.iterdir()} for folder in folders.values()]
    assert len(stored[0]) == 2  # the third source is the first once more
    assert all(files == stored[0] for files in stored[1:])


@pytest.mark.usefixtures("eager")
def test_a_broken_file_stops_the_index_also_in_a_worker(tmp_path: Path, processor: Processor) -> None:
    path = write_llava(tmp_path, 9)
    path.write_text(path.read_text()[:-30])
    with pytest.raises(ValueError, match="is no whole JSON list"):
        index_of(path, processor, workers=2)


def test_big_shards_are_cut_only_where_workers_would_idle() -> None:
    def parts(shards: int, size: int, workers: int) -> list[int]:
        jobs = index_jobs.cut_jobs([(0, shard, size) for shard in range(shards)], workers)
        return [job.parts for job in jobs]

    assert parts(1, 1000 * index_jobs.PART, 8) == [8] * 8
    assert parts(1, index_jobs.PART, 8) == [1]
    assert parts(2, 1000 * index_jobs.PART, 5) == [2] * 4
    assert parts(9, 1000 * index_jobs.PART, 8) == [1] * 9
    assert parts(1, 1000 * index_jobs.PART, 0) == [1]


def lines(number: int) -> pa.Table:
    """What a shard of so many samples with one image each is measured to be."""
    at = np.arange(number)
    columns = {
        "id": pc.binary_join_element_wise("GCC_train_", pc.utf8_lpad(pa.array(at).cast(pa.string()), 9, "0"), ""),
        "start": at * 300,
        "size": np.full(number, 300),
        "row": at,
        "part": np.zeros(number, np.int16),
        "length": at % 500 + 20,
        "supervised": at % 30 + 2,
        "cut": np.zeros(number, np.int32),
        "tiles": np.ones(number, np.int32),
        "sizes": pa.ListArray.from_arrays(np.arange(0, 2 * number + 1, 2), np.full(2 * number, 640, np.int32)),
        **{name: pa.nulls(number, pa.string()) for name in ("variant", "kind", "cause")},
    }
    arrays = [pa.array(column).cast(measure.SCHEMA.field(name).type) for name, column in columns.items()]
    return pa.table(dict(zip(columns, arrays, strict=True))).cast(measure.SCHEMA)


def test_a_million_samples_take_less_than_150_bytes_each(tmp_path: Path) -> None:
    (tmp_path / "data.json").write_text("[]")
    number = 1_000_000
    index = assemble([LlavaSource(path=tmp_path / "data.json")], {(0, 0): lines(number)}, ROW)
    held = sum(
        value.nbytes
        for field in fields(index)
        if isinstance(value := getattr(index, field.name), np.ndarray | pa.Array)
    )
    assert len(index) == number
    assert held < 150 * number
    assert index.place(number - 1).start == (number - 1) * 300
    assert index.id(7) == "GCC_train_000000007"
