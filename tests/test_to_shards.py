"""Whatever a recipe can read becomes tars of the same samples, whenever the run is stopped, by however many workers."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from conftest import make_processor, picture, write_llava
from mllm.data.crew import run_jobs
from mllm.data.curation.shards.members import Pictures, members_of
from mllm.data.curation.source_options import source_of
from mllm.data.formats.auto import AutoSource
from mllm.data.formats.source import Source
from mllm.data.images import open_image
from mllm.data.index import build_index
from mllm.types import Mark, Message, Sample
from scripts import FOLDER, load_script
from small_sources import CASES, RED, captions, coco, jpeg, lines, llava, pictures, several_captions

Told = tuple[int, str, str]


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load_script("to_shards")


@pytest.fixture
def to_shards(script: ModuleType, capfd: pytest.CaptureFixture[str]) -> Callable[..., Told]:
    """Run the command; leaves exit code, output and errors."""

    def run(path: Path | str, out: Path, *flags: str) -> Told:
        if "--workers" not in flags:
            flags = (*flags, "--workers", "0")
        code = script.door([str(path), "--out", str(out), *flags])
        return (code, *capfd.readouterr())

    return run


def seen(source: Source) -> list[Any]:
    """All that training sees of the samples, and of images the files' bytes."""
    samples = []
    for item in source.read():
        assert isinstance(item, Sample), item
        files = [image if isinstance(image, bytes) else Path(str(image)).read_bytes() for image in item.images]
        samples.append((item.id, item.messages, item.variant, files))
    return samples


def folder_bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("case", CASES)
def test_shards_hold_the_same_samples_as_the_source(case: str, tmp_path: Path, to_shards: Callable[..., Told]) -> None:
    write, kind, options, reading = CASES[case]
    pictures(tmp_path)
    path, out = write(tmp_path), tmp_path / "out"
    code, said, _ = to_shards(path, out, "--format", kind, "--options", options, "--samples-per-shard", "2")
    assert code == 0, said
    assert len(list(out.glob("*.tar"))) > 1 or case == "fields of a table"
    shards = source_of(str(out), "captions" if reading else "auto", options=reading)
    before = source_of(str(path), kind, options=options)
    assert seen(shards) == seen(before)
    assert f"format: {shards.format}" in said  # type: ignore[attr-defined]


def test_captions_of_one_coco_image_share_one_file(tmp_path: Path, to_shards: Callable[..., Told]) -> None:
    pictures(tmp_path)
    code, said, _ = to_shards(coco(tmp_path), tmp_path / "out")
    samples = seen(AutoSource(path=tmp_path / "out"))
    assert (code, "3 records (7 samples)" in said) == (0, True)
    assert [(name, talk[1].text) for name, talk, _, _ in samples] == [
        *[("0#0", "no 0"), ("0#1", "no 3"), ("0#2", "no 6")],
        *[("1#0", "no 1"), ("1#1", "no 4"), ("2#0", "no 2"), ("2#1", "no 5")],
    ]
    assert [files[0] for *_, files in samples] == [jpeg(0)] * 3 + [jpeg(1)] * 2 + [jpeg(2)] * 2


def test_img2dataset_shards_are_dealt_anew_with_what_stands_beside_them(
    tmp_path: Path, to_shards: Callable[..., Told]
) -> None:
    pictures(tmp_path)
    to_shards(several_captions(tmp_path), tmp_path / "one", "--samples-per-shard", "3")
    assert to_shards(tmp_path / "one", tmp_path / "two", "--samples-per-shard", "1")[0] == 0
    one, two = (AutoSource(path=tmp_path / name) for name in ("one", "two"))
    assert seen(one) == seen(two)
    assert [item.meta for item in one.read()] == [item.meta for item in two.read()]  # type: ignore[union-attr]


def test_an_index_of_the_shards_counts_the_same(tmp_path: Path, to_shards: Callable[..., Told]) -> None:
    path = write_llava(tmp_path / "in", 9)
    to_shards(path, tmp_path / "out", "--samples-per-shard", "4")
    before, after = (
        build_index([AutoSource(path=place)], make_processor(), 160, progress=False, workers=0)
        for place in (path, tmp_path / "out")
    )
    assert before.ids == after.ids
    assert np.array_equal(before.length, after.length)
    assert np.array_equal(before.supervised, after.supervised)
    pixels = [open_image(index.sample(5).images[0]).tobytes() for index in (before, after)]
    assert pixels[0] == pixels[1]


def test_larger_images_are_shrunk_and_only_these(tmp_path: Path, to_shards: Callable[..., Told]) -> None:
    pictures(tmp_path, 1)
    picture(1, (100, 50)).save(tmp_path / "1.jpg", "JPEG")
    picture(2, (40, 80)).save(tmp_path / "2.jpg", "PNG")
    path = lines(tmp_path / "data.jsonl", [{"image": f"{i}.jpg", "caption": "noise"} for i in range(3)])
    assert to_shards(path, tmp_path / "out", "--max-side", "40")[0] == 0
    with tarfile.open(tmp_path / "out" / "00000.tar") as archive:
        names = [name for name in archive.getnames() if not name.endswith(("txt", "json"))]
    assert names == ["000000000.jpg", "000000001.jpg", "000000002.png"]
    files = [files[0] for *_, files in seen(AutoSource(path=tmp_path / "out"))]
    assert files[0] == jpeg(0)
    assert [open_image(file).size for file in files] == [(32, 32), (40, 20), (20, 40)]


def test_any_number_of_workers_writes_the_same_bytes(tmp_path: Path, to_shards: Callable[..., Told]) -> None:
    path = write_llava(tmp_path / "in", 25)
    (tmp_path / "in" / "images" / "7.png").unlink()
    folders = []
    for workers in ("0", "2"):
        to_shards(path, tmp_path / workers, "--samples-per-shard", "3", "--workers", workers)
        folders.append(folder_bytes(tmp_path / workers))
    assert folders[0] == folders[1]
    assert len([name for name in folders[0] if name.endswith(".tar")]) == 9


def test_a_killed_run_goes_on_to_the_same_bytes(tmp_path: Path, to_shards: Callable[..., Told]) -> None:
    talk = [{"from": "human", "value": "<image>?"}, {"from": "gpt", "value": "noise"}]
    for i in range(2):
        picture(i, (600, 600)).save(tmp_path / f"{i}.png")
    records = [{"id": str(i), "image": f"{i % 2}.png", "conversations": talk} for i in range(60)]
    path = lines(tmp_path / "data.jsonl", records)
    flags = ("--samples-per-shard", "3")
    command = [
        sys.executable,
        str(FOLDER / "to_shards.py"),
        str(path),
        "--out",
        str(tmp_path / "killed"),
        *flags,
        "--workers",
        "2",
    ]
    run = subprocess.Popen(command, stdout=subprocess.DEVNULL, start_new_session=True)
    deadline = time.monotonic() + 60
    while not list((tmp_path / "killed").glob("*_stats.json")):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    run.send_signal(signal.SIGKILL)
    run.wait()
    finished = {found: found.stat().st_mtime_ns for found in (tmp_path / "killed").glob("*_stats.json")}
    assert len(finished) < 20
    code, said, _ = to_shards(path, tmp_path / "killed", *flags)
    assert code == 0
    assert "were there already" in said
    to_shards(path, tmp_path / "whole", *flags)
    assert folder_bytes(tmp_path / "killed") == folder_bytes(tmp_path / "whole")
    assert {found: found.stat().st_mtime_ns for found in finished} == finished


def test_a_shard_that_is_gone_is_written_again_and_no_other(tmp_path: Path, to_shards: Callable[..., Told]) -> None:
    path, out = write_llava(tmp_path / "in", 6), tmp_path / "out"
    to_shards(path, out, "--samples-per-shard", "2")
    before, times = folder_bytes(out), {name: (out / name).stat().st_mtime_ns for name in os.listdir(out)}
    (out / "00001.tar").write_bytes(b"half")
    code, said, _ = to_shards(path, out, "--samples-per-shard", "2")
    assert (code, "3 shards (2 were there already)" in said) == (0, True)
    assert folder_bytes(out) == before
    changed = {name for name, moment in times.items() if (out / name).stat().st_mtime_ns != moment}
    assert changed == {"00001.tar", "00001_stats.json"}


def test_shards_of_other_settings_are_refused_until_told_to_start_anew(
    tmp_path: Path, to_shards: Callable[..., Told]
) -> None:
    path, out = write_llava(tmp_path / "in", 6), tmp_path / "out"
    to_shards(path, out, "--samples-per-shard", "2")
    code, _, error = to_shards(path, out, "--samples-per-shard", "4")
    assert (code, "samples_per_shard was 2, is 4" in error, "--overwrite" in error) == (2, True, True)
    assert "image_dir was None, is /x" in to_shards(path, out, "--samples-per-shard", "2", "--image-dir", "/x")[2]
    path.write_text(path.read_text() + "\n")
    assert "files changed, times changed" in to_shards(path, out, "--samples-per-shard", "2")[2]
    assert to_shards(path, out, "--samples-per-shard", "4", "--overwrite")[0] == 0
    assert sorted(name.name for name in out.glob("*.tar")) == ["00000.tar", "00001.tar"]


def test_a_folder_of_other_files_is_never_touched(tmp_path: Path, to_shards: Callable[..., Told]) -> None:
    path = write_llava(tmp_path / "in", 2)
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("")
    code, _, error = to_shards(path, tmp_path / "thesis", "--overwrite")
    assert (code, "holds other files (chapter.txt)" in error) == (2, True)
    assert to_shards(path, tmp_path / "out")[0] == 0
    code, _, error = to_shards(tmp_path / "out", tmp_path / "out", "--overwrite")
    assert (code, "holds the source itself" in error) == (2, True)
    assert len(seen(AutoSource(path=tmp_path / "out"))) == 2


def test_what_is_in_no_shard_is_in_quarantine(tmp_path: Path, to_shards: Callable[..., Told]) -> None:
    path, out = write_llava(tmp_path, 12), tmp_path / "out"
    (tmp_path / "images" / "3.png").unlink()
    whole = (tmp_path / "images" / "4.png").read_bytes()
    (tmp_path / "images" / "4.png").write_bytes(whole[:-800])
    (tmp_path / "images" / "5.png").write_bytes(b"not a picture")
    code, said, _ = to_shards(path, out, "--samples-per-shard", "3")
    told = [json.loads(line) for line in (out / "quarantine.jsonl").read_text().splitlines()]
    assert (code, "3 records are in no shard" in said) == (4, True)
    assert [(line["id"], line["row"], line["kind"]) for line in told] == [(f"r{i}", i, "image") for i in (3, 4, 5)]
    assert all(line["file"] == str(path) for line in told)
    assert all(f"cannot read image {tmp_path}/images/{i}.png: " in told[i - 3]["cause"] for i in (3, 4, 5))
    assert [name for name, *_ in seen(AutoSource(path=f"{out}/*.tar"))] == [f"r{i}" for i in (0, 1, 2, *range(6, 12))]
    assert not (out / "00001.tar").exists(), "all three of its records are bad"
    before = folder_bytes(out)
    assert to_shards(path, out, "--samples-per-shard", "3")[0] == 4
    assert folder_bytes(out) == before


def test_records_that_cannot_be_read_are_worse_than_images(tmp_path: Path, to_shards: Callable[..., Told]) -> None:
    path, out = write_llava(tmp_path, 5), tmp_path / "out"
    records = json.loads(path.read_text())
    records[1]["image"] = []
    records[2]["image"] = "images/none.png"
    path.write_text(json.dumps(records))
    assert to_shards(path, out)[0] == 3
    told = [json.loads(line) for line in (out / "quarantine.jsonl").read_text().splitlines()]
    assert [(line["row"], line["kind"]) for line in told] == [(1, "record"), (2, "image")]
    assert "1 <image> placeholders but 0 images" in told[0]["cause"]
    assert json.loads((out / "00000_stats.json").read_text())["records"] == 3


def test_headers_alone_are_looked_at_where_decoding_is_switched_off(
    tmp_path: Path, to_shards: Callable[..., Told]
) -> None:
    path = write_llava(tmp_path, 2)
    damaged = (tmp_path / "images" / "1.png").read_bytes()[:-800]
    (tmp_path / "images" / "1.png").write_bytes(damaged)
    assert to_shards(path, tmp_path / "out", "--no-decode")[0] == 0
    assert seen(AutoSource(path=tmp_path / "out"))[1][3] == [damaged]


def test_a_dry_run_counts_and_writes_nothing(tmp_path: Path, to_shards: Callable[..., Told]) -> None:
    pictures(tmp_path)
    path = lines(tmp_path / "data.jsonl", [*map(json.loads, captions(tmp_path).read_text().splitlines()), {"image": 1}])
    code, said, _ = to_shards(path, tmp_path / "out", "--dry-run", "--samples-per-shard", "3")
    assert code == 3
    assert "captions, JSON lines, 1 file" in said
    assert "4 records (4 samples) make 2 shards of up to 3; 1 records cannot be read" in said
    assert "row 4: the key 'caption' is missing" in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("flags", "hint"),
    [
        (("--format", "lava"), "lava"),
        (("--options", "{prompt: x}"), "prompt is an option of some formats: name the format with --format"),
        (("--options", "[x]"), "options must be a mapping"),
        (("--options", "{path: x}"), "options hold path, which have flags of their own"),
        (("--samples-per-shard", "0"), "--samples-per-shard is 0: give a positive number"),
    ],
)
def test_a_mistake_is_one_line(
    flags: tuple[str, ...], hint: str, tmp_path: Path, to_shards: Callable[..., Told]
) -> None:
    code, _, error = to_shards(write_llava(tmp_path, 2), tmp_path / "out", *flags)
    assert code == 2
    assert hint in error
    assert error.count("\n") == 1


def test_stock_webdataset_reads_captions_and_chats(tmp_path: Path, to_shards: Callable[..., Told]) -> None:
    wds = pytest.importorskip("webdataset", reason="no webdataset: pip install webdataset")
    pictures(tmp_path)
    to_shards(captions(tmp_path), tmp_path / "captions", "--samples-per-shard", "2")
    found = list(wds.WebDataset(f"{tmp_path}/captions/{{00000..00001}}.tar", shardshuffle=False).decode("pil"))
    assert [(record["txt"], record["json"]["id"]) for record in found] == [(f"no {i}", f"c{i}") for i in range(4)]
    assert [record["jpg"].tobytes() for record in found] == [open_image(jpeg(i)).tobytes() for i in range(4)]
    to_shards(llava(tmp_path), tmp_path / "chats")
    found = list(wds.WebDataset(f"{tmp_path}/chats/00000.tar", shardshuffle=False).decode("pil"))
    assert found[2]["json"]["images"] == ["0.jpg", "1.jpg"]
    assert found[2]["1.jpg"].tobytes() == open_image(jpeg(0)).tobytes()
    assert found[4]["json"]["messages"][0] == {"role": "system", "content": "be brief"}


def test_columns_whose_name_the_layout_needs_are_kept_under_another() -> None:
    talk = [Message("user", ["?"]), Message("assistant", ["red"])]
    meta = {"images": 3, "split": "train", "Texts": ["a"], "day": b"xyz"}
    [(part, data)] = members_of([Sample("a", talk, meta=meta)], "messages", Pictures())
    assert part == "json"
    assert json.loads(data) == {
        **{"id": "a", "messages": [{"role": "user", "content": "?"}, RED]},
        **{"images_of_source": 3, "split": "train", "Texts_of_source": ["a"], "day": "(3 bytes)"},
    }


def test_words_that_would_pass_for_an_image_are_refused() -> None:
    talk = [Message("user", [Mark.IMAGE, "what is <image>?"]), Message("assistant", ["a tag"])]
    with pytest.raises(ValueError, match="the words themselves hold <image>"):
        members_of([Sample("a", talk, [jpeg(0)])], "messages", Pictures())


def die(job: int, tick: Any) -> int:
    os._exit(9)


def test_a_worker_that_is_killed_is_told() -> None:
    with pytest.raises(ValueError, match=r"a worker was killed, .* fewer workers "):
        list(run_jobs(die, [1, 2], 2, "test", 2, "jobs"))
