"""Nothing is dropped in silence: every fault is named once, the sums agree, and too much loss stops the run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from conftest import make_processor, write_llava
from mllm.data.formats.llava import LlavaSource
from mllm.data.index import Index, build_index
from mllm.data.indexing.tally import sentence
from mllm.train import ledger
from mllm.train.ledger import Quarantine
from mllm.types import Fault
from runs import SEQ_LENGTH, metrics, run, settings


def spoil_once_indexed(monkeypatch: pytest.MonkeyPatch, *names: int) -> None:
    """Images that break between the index and the first step."""
    import runs

    def build(sources: list[Any], *arguments: Any, **options: Any) -> Index:
        index = build_index(sources, *arguments, **options)
        for name in names:
            (sources[0].path.parent / "images" / f"{name}.png").write_bytes(b"broken")
        return index

    monkeypatch.setattr(runs, "build_index", build)


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "quarantine.jsonl").read_text().splitlines()]


def told(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "ledger.json").read_text())


def test_whole_data_leave_a_ledger_and_no_quarantine(tmp_path: Path) -> None:
    run(write_llava(tmp_path), settings(tmp_path / "out"))
    assert not (tmp_path / "out" / "quarantine.jsonl").exists()
    assert told(tmp_path / "out") == {
        "read": 12,
        "used": 12,
        "skipped": {},
        "filtered": {},
        "truncated": {"samples": 0, "tokens": 0},
    }


def test_a_sample_that_turns_unreadable_is_named_once_with_its_cause(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write_llava(tmp_path)
    spoil_once_indexed(monkeypatch, 4, 7)
    run(data, settings(tmp_path / "out", steps=6), max_bad_share=0.2)  # two epochs and more: met several times
    found = {line["id"]: line for line in lines(tmp_path / "out")}
    assert len(lines(tmp_path / "out")) == len(found) == 2
    assert {line["where"] for line in found.values()} == {f"{data}, row {row}" for row in (4, 7)}
    assert all("cannot read image" in line["cause"] and line["kind"] == "image" for line in found.values())
    assert told(tmp_path / "out")["skipped"] == {"image": 2}
    assert told(tmp_path / "out")["used"] == 10
    assert metrics(tmp_path / "out", "skipped")[-1] == (2,)


def test_more_holes_than_allowed_stop_the_run_and_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = write_llava(tmp_path)
    spoil_once_indexed(monkeypatch, *range(6))
    with pytest.raises(ValueError, match=r"(?s)samples cannot be read.*max_bad_share allows.*cannot read image"):
        run(data, settings(tmp_path / "out"), max_bad_share=0.2)
    assert lines(tmp_path / "out")
    assert told(tmp_path / "out")["skipped"]["image"] >= 3


def test_many_holes_in_a_row_stop_the_run_whatever_share_is_allowed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ledger, "IN_A_ROW", 15)
    data = write_llava(tmp_path)
    spoil_once_indexed(monkeypatch, *range(12))  # no good sample ever ends the row
    with pytest.raises(ValueError, match="15 samples one after the other cannot be read"):
        run(data, settings(tmp_path / "out", steps=20), max_bad_share=1.0)


def test_a_resumed_run_remembers_the_holes_in_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger, "IN_A_ROW", 25)
    data = write_llava(tmp_path)
    spoil_once_indexed(monkeypatch, *range(12))
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    with pytest.raises(ValueError, match="25 samples one after the other") as ended:
        run(data, settings(whole, steps=20), max_bad_share=1.0)
    write_llava(tmp_path)
    run(data, settings(cut, steps=2, save_every=1), max_bad_share=1.0)
    write_llava(tmp_path)
    with pytest.raises(ValueError, match="25 samples one after the other") as ended_later:
        run(data, settings(cut, steps=20), max_bad_share=1.0, resume=True)
    assert metrics(cut, "step") == metrics(whole, "step")
    assert str(ended_later.value) == str(ended.value).replace("whole", "cut")


def test_a_good_sample_ends_the_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger, "IN_A_ROW", 15)
    data = write_llava(tmp_path)
    spoil_once_indexed(monkeypatch, *range(6))
    run(data, settings(tmp_path / "out", steps=20), max_bad_share=1.0)


def test_lines_and_counts_survive_a_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = write_llava(tmp_path)
    spoil_once_indexed(monkeypatch, 4, 7)
    whole, cut = (settings(tmp_path / name, steps=6, save_every=3) for name in ("whole", "cut"))
    run(data, whole, max_bad_share=0.2)
    shutil.copytree(whole.output_dir, cut.output_dir)
    shutil.rmtree(cut.output_dir / "checkpoints" / "step-6")
    with (cut.output_dir / "quarantine.jsonl").open("a") as file:
        file.write('{"id": "r9", "whe')
    write_llava(tmp_path)  # mended meanwhile, and broken again
    run(data, cut, resume=True, max_bad_share=0.2)
    assert lines(cut.output_dir) == lines(whole.output_dir)
    assert told(cut.output_dir) == told(whole.output_dir)
    assert metrics(cut.output_dir, "skipped") == metrics(whole.output_dir, "skipped")


def test_faults_of_the_index_and_of_the_run_stand_in_one_file(tmp_path: Path) -> None:
    early, late = Fault("record", "", "a.json, row 3", "no image"), Fault("image", "x", "a.json, row 5", "gone", 4)
    Quarantine(tmp_path).add([early])
    Quarantine(tmp_path).add([early, late], step=7)
    assert lines(tmp_path) == [
        {"id": "", "where": "a.json, row 3", "cause": "no image", "kind": "record", "step": None},
        {"id": "x", "where": "a.json, row 5", "cause": "gone", "kind": "image", "step": 7},
    ]


def test_the_sums_of_the_ledger_agree(tmp_path: Path) -> None:
    path = write_llava(tmp_path, 9)
    (tmp_path / "images/3.png").unlink()
    records = json.loads(path.read_text())
    del records[5]["conversations"]
    path.write_text(json.dumps(records))
    index = build_index([LlavaSource(path=path)], make_processor(), 30, progress=False)
    index.filtered["too small"] += 4
    assert max(index.length) <= 30 < SEQ_LENGTH
    tally = index.tally
    tally.holes["changed"] += 1
    sums = tally.summary()
    assert (sums["read"], sums["used"]) == (13, 6)
    assert sums["skipped"] == {"image": 1, "record": 1, "changed": 1, "filtered": 4}
    assert sums["truncated"]["samples"] == 7
    assert sentence(sums).startswith("13 read = 6 used + 7 skipped (image 1, record 1, changed 1, filtered 4); 7 trunc")
