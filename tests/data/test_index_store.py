"""What was measured is read back, and nothing that is stale, foreign or half-written is ever believed."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from conftest import make_processor, picture, write_llava
from indexing import ROW, contents, spoil
from mllm.data.formats.llava import LlavaSource
from mllm.data.index import Index, build_index
from mllm.data.indexing.store import default_folder
from mllm.data.processor import Processor


@pytest.fixture
def scans(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The files that were gone through, in order."""
    gone, scan = [], LlavaSource.scan

    def counted(self: LlavaSource, shard: int) -> Iterator[Any]:
        gone.append(self.shards()[shard].parent.name)
        yield from scan(self, shard)

    monkeypatch.setattr(LlavaSource, "scan", counted)
    return gone


class Stage:
    """Two files and the folder in which their counts are kept."""

    def __init__(self, folder: Path) -> None:
        self.paths = [write_llava(folder / name, 6) for name in ("one", "two")]
        self.folder = folder / "index"

    def index(self, processor: Processor, max_length: int = ROW, **changes: Any) -> Index:
        sources = [LlavaSource(path=path, **changes) for path in self.paths]
        return build_index(sources, processor, max_length, folder=self.folder, progress=False)

    def files(self) -> list[Path]:
        return sorted(self.folder.iterdir())


@pytest.fixture
def stage(tmp_path: Path) -> Stage:
    return Stage(tmp_path)


def test_a_second_run_measures_nothing_and_finds_the_same(stage: Stage, processor: Processor, scans: list[str]) -> None:
    spoil(stage.paths[1])
    first = stage.index(processor, max_length=36)
    assert scans == ["one", "two"]
    second = stage.index(make_processor(), max_length=36)
    assert scans == ["one", "two"]
    assert len(first.faults) == 3
    assert contents(second) == contents(first)
    assert second.fingerprint() == first.fingerprint()


def test_only_what_changed_is_measured_again(stage: Stage, processor: Processor, scans: list[str]) -> None:
    stage.index(processor)
    stage.paths[1].write_text(stage.paths[1].read_text().replace("it is 3", "it is three"))
    again = stage.index(processor)
    assert scans == ["one", "two", "two"]
    assert again.sample(9).messages[1].text == "it is three"
    assert len(stage.files()) == 2  # the new counts took the place of the old ones


def test_a_file_touched_without_a_change_of_size_is_measured_again(
    stage: Stage, processor: Processor, scans: list[str]
) -> None:
    stage.index(processor)
    stage.paths[0].write_text(stage.paths[0].read_text().replace("it is 3", "it's 33"))
    assert stage.index(processor).sample(3).messages[1].text == "it's 33"
    assert scans == ["one", "two", "one"]


def other_tokens() -> Processor:
    processor = make_processor()
    processor.tokenizer.add_tokens(["it is"])
    return processor


def other_template() -> Processor:
    return make_processor(chat_template=(make_processor().tokenizer.chat_template or "") + " ")


OTHERS: dict[str, Callable[[], tuple[Processor, dict[str, Any]]]] = {
    "tokenizer": lambda: (other_tokens(), {}),
    "template": lambda: (other_template(), {}),
    "visual tokens": lambda: (make_processor(visual_tokens=3), {}),
    "length": lambda: (make_processor(), {"max_length": 30}),
    "settings of the source": lambda: (make_processor(), {"bare": True}),
}


@pytest.mark.parametrize("what", OTHERS)
def test_counts_of_other_settings_are_not_used_and_not_lost(
    stage: Stage, processor: Processor, scans: list[str], what: str
) -> None:
    stage.index(processor)
    other, changes = OTHERS[what]()
    changed = stage.index(other, **changes)
    assert scans == ["one", "two"] * 2
    stage.index(processor)
    assert stage.index(other, **changes).length.tolist() == changed.length.tolist()
    assert scans == ["one", "two"] * 2


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def emptied(path: Path) -> None:
    path.write_bytes(b"")


def other_table(path: Path) -> None:
    pq.write_table(pq.read_table(path).drop_columns("cut"), path)


@pytest.mark.parametrize("spoiled", [cut_short, emptied, other_table])
def test_a_spoiled_file_is_made_anew(
    stage: Stage, processor: Processor, scans: list[str], spoiled: Callable[[Path], None]
) -> None:
    first = stage.index(processor)
    for path in stage.files():
        spoiled(path)
    assert contents(stage.index(processor)) == contents(first)
    assert contents(stage.index(processor)) == contents(first)
    assert scans == ["one", "two"] * 2


def test_counts_of_another_file_are_not_taken_for_this_ones(
    stage: Stage, processor: Processor, scans: list[str]
) -> None:
    stage.index(processor)
    one, two = stage.files()
    shutil.copy(one, two)
    stage.index(processor)
    assert len(scans) == 3


def test_a_run_that_dies_while_writing_leaves_nothing(
    stage: Stage, processor: Processor, monkeypatch: pytest.MonkeyPatch
) -> None:
    def half(table: Any, path: Path) -> None:
        path.write_bytes(b"PAR1 half a table")
        raise KeyboardInterrupt

    with monkeypatch.context() as broken:
        broken.setattr(pq, "write_table", half)
        with pytest.raises(KeyboardInterrupt):
            stage.index(processor)
    assert stage.files() == []


def test_what_was_measured_before_a_crash_is_kept(
    stage: Stage, processor: Processor, scans: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = stage.paths[1].read_text()
    stage.paths[1].write_text(whole[:-20])
    with pytest.raises(ValueError, match="no whole JSON list"):
        stage.index(processor)
    stage.paths[1].write_text(whole)
    assert len(stage.index(processor)) == 12
    assert scans == ["one", "two", "two"]


def test_an_image_that_was_mended_is_noticed(stage: Stage, processor: Processor, scans: list[str]) -> None:
    image = stage.paths[0].parent / "images" / "2.png"
    image.write_bytes(b"broken")
    assert [stage.index(processor).faults[0].id for _ in range(2)] == ["r2"] * 2
    assert scans == ["one", "two"]
    picture(2).save(image)
    mended = stage.index(processor)
    assert scans == ["one", "two", "one"]
    assert (len(mended), mended.faults) == (12, [])


def test_a_folder_that_cannot_be_written_is_told(tmp_path: Path, processor: Processor) -> None:
    stage = Stage(tmp_path)
    stage.folder.write_text("a file")
    with pytest.raises(ValueError, match=r"cannot be written to .*index.* data\.index_dir or \$MLLM_CACHE"):
        stage.index(processor)


def test_the_place_of_all_indices_can_be_moved(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLLM_CACHE", "/somewhere")
    assert default_folder() == Path("/somewhere/index")
