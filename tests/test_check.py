"""The doctor finds every fault that was planted, by file and row, and nothing where nothing is wrong."""

from __future__ import annotations

import io
import json
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from PIL import Image

from conftest import picture, write_llava
from mllm.data.curation.doctor.classes import CLASSES
from scripts import load_script

Checked = tuple[int, str, dict[str, Any]]


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load_script("check")


@pytest.fixture
def check(script: ModuleType, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Callable[..., Checked]:
    """Run the command; leaves exit code, what was said, and the report."""

    def run(path: Path | str, *flags: str) -> Checked:
        report = tmp_path / "report" / "out.json"
        report.parent.mkdir(exist_ok=True)
        report.unlink(missing_ok=True)
        if "--workers" not in flags:
            flags = (*flags, "--workers", "0")
        code = script.door([str(path), "--json", str(report), *flags])
        said = "".join(capfd.readouterr())
        return code, said, json.loads(report.read_text()) if report.is_file() else {}

    return run


def found(report: dict[str, Any]) -> list[tuple[str, int | None]]:
    """(class, row) of each finding."""
    return [(finding["kind"], finding["row"]) for finding in report["findings"]]


def talk(*turns: str) -> list[dict[str, str]]:
    return [{"from": ("human", "gpt")[place % 2], "value": words} for place, words in enumerate(turns)]


def planted(folder: Path) -> Path:
    """JSON lines with one fault in each row but the first."""
    images = folder / "images"
    images.mkdir(parents=True)
    for name in ("0.png", "9.png"):
        picture(int(name[0]), (64, 40)).save(images / name)
    (images / "cut.png").write_bytes((images / "0.png").read_bytes()[:-800])
    (images / "text.png").write_bytes(b"<html>not found</html>")
    picture(3, (64, 4)).save(images / "thin.png")
    good = {"image": "images/0.png", "conversations": talk("<image>?", "red")}
    records: list[Any] = [
        {"id": "good", **good},
        {"id": "b", **good, "conversations": talk("no placeholder", "red")},
        {"id": "c", "image": ["images/0.png"] * 2, "conversations": talk("<image>?", "red")},
        {"id": "d", **good, "conversations": talk("<image>?", "  ")},
        {"id": "e", "image": "images/0.png"},
        {"id": "f", **good, "conversations": [{"from": "narrator", "value": "<image>"}]},
        {"id": "g", **good, "image": "images/none.png"},
        {"id": "h", **good, "image": "images/cut.png"},
        {"id": "i", **good, "image": "images/text.png"},
        {"id": "good", **good},
        {"id": "k", **good, "conversations": talk("<image>?", "red", "and?", "")},
        {"id": "l", **good, "conversations": talk("<image>?", "red")[::-1]},
        {"id": "m", **good, "conversations": talk("<image>?", "red", "and?")},
        {"id": "n", **good, "image": "images/thin.png"},
        {"id": "o", **good, "image": "http://localhost:9/a.png"},
        {"id": "p", **good, "conversations": [{"from": "human", "value": 5}]},
        {"id": "q", **good, "conversations": []},
    ]
    text = [json.dumps(record) for record in records]
    text.insert(16, '{"id": "broken", "conv')
    (folder / "data.jsonl").write_text("\n".join(text) + "\n")
    return folder / "data.jsonl"


FAULTS = [
    *[("placeholder mismatch", 1), ("placeholder mismatch", 2), ("nothing to learn", 3), ("missing key", 4)],
    *[("unknown speaker", 5), ("missing image", 6), ("broken image", 7), ("broken image", 8), ("duplicate id", 9)],
    *[("empty answer", 10), ("odd turns", 11), ("odd turns", 12), ("small picture", 13), ("unreachable image", 14)],
    *[("bad record", 15), ("not JSON", 16), ("nothing to learn", 17)],
]


def test_each_planted_fault_is_found_with_its_class_file_and_row(tmp_path: Path, check: Callable[..., Checked]) -> None:
    path = planted(tmp_path / "in")
    code, said, report = check(path)
    assert (code, report["exit_code"]) == (3, 3)
    assert found(report) == FAULTS
    assert {finding["file"] for finding in report["findings"]} == {str(path)}
    assert report["counts"] == {kind: [each for each, _ in FAULTS].count(kind) for kind in report["counts"]}
    assert (report["records"], report["samples"], report["images"]) == (18, 10, 10)
    told = {finding["row"]: finding for finding in report["findings"]}
    assert told[9]["cause"] == f"the id 'good' is also that of {path}, row 0"
    assert told[6]["id"] == "g"
    assert told[6]["cause"] == f"cannot read image {path.parent}/images/none.png: no such file"
    assert all(finding["remedy"] == CLASSES[finding["kind"]].remedy for finding in report["findings"])
    joined = " ".join(said.replace("│", " ").split())
    for kind in report["counts"]:
        assert kind in joined
        assert CLASSES[kind].remedy in joined
    assert f"{path}, row 1: 0 <image> placeholders but 1 images" in joined


def test_a_clean_set_is_told_to_be_clean(tmp_path: Path, check: Callable[..., Checked]) -> None:
    code, said, report = check(write_llava(tmp_path, 5))
    assert (code, found(report)) == (0, [])
    assert "llava, one JSON list, 1 file" in said
    assert "user: '[image]\\nwhat is 0 0?'" in said
    assert "5 records: 5 samples, 0 of them without images; 5 images, sides of 32 to 32 pixels" in said
    assert "nothing wrong" in said


def test_any_number_of_workers_reports_the_same(tmp_path: Path, check: Callable[..., Checked]) -> None:
    path = planted(tmp_path / "in")
    more = path.with_name("more.jsonl")
    more.write_text("".join(line for line in path.read_text().splitlines(keepends=True) * 10))
    reports = [check(more, "--workers", workers)[2] for workers in ("0", "2")]
    assert reports[0] == reports[1]
    assert reports[0]["records"] == 180
    assert reports[0]["counts"]["broken image"] == 20
    both = [check(path.parent, "--workers", workers)[2] for workers in ("0", "3")]
    assert both[0] == both[1]
    assert both[0]["files"] == [str(path), str(more)]


def test_the_exit_code_is_that_of_the_worst_class(tmp_path: Path, check: Callable[..., Checked]) -> None:
    path = write_llava(tmp_path, 4)
    records = json.loads(path.read_text())
    records[2]["id"] = "r1"
    path.write_text(json.dumps(records))
    assert (check(path)[0], found(check(path)[2])) == (5, [("duplicate id", 2)])
    (tmp_path / "images" / "3.png").write_bytes(b"")
    assert check(path)[0] == 4
    assert check(path, "--no-images")[0] == 5
    del records[0]["conversations"]
    path.write_text(json.dumps(records))
    assert check(path)[0] == 3
    path = write_llava(tmp_path, 20)
    path.write_text(path.read_text()[:-9])
    code, _, report = check(path)
    assert (code, report["samples"], found(report)) == (2, 19, [("broken file", None)])


def test_images_stay_closed_where_only_records_are_asked_for(tmp_path: Path, check: Callable[..., Checked]) -> None:
    _, said, report = check(planted(tmp_path / "in"), "--no-images")
    assert not [kind for kind, _ in found(report) if kind.endswith("image")]
    assert (report["images"], report["median_size"]) == (10, [0, 0])
    assert "10 images\n" in said


@pytest.mark.parametrize("where", ["elsewhere/data", "data.zip", "../pictures"])
def test_a_folder_that_has_the_missing_images_is_named(
    where: str, tmp_path: Path, check: Callable[..., Checked]
) -> None:
    path = write_llava(tmp_path / "in", 3)
    records = [{**record, "image": record["image"].removeprefix("images/")} for record in json.loads(path.read_text())]
    path.write_text(json.dumps(records))
    images, target = tmp_path / "in" / "images", tmp_path / "in" / where
    if target.suffix:
        with zipfile.ZipFile(target, "w") as archive:
            for image in sorted(images.iterdir()):
                archive.write(image, image.name)
        for image in images.iterdir():
            image.unlink()
    elif where.startswith(".."):
        target = images.rename(tmp_path / "pictures")
    else:
        target = images
    code, said, report = check(path)
    assert (code, report["counts"]) == (4, {"missing image": 3})
    [line] = report["advice"]
    assert line == f"the images lie elsewhere: try --image-dir {target}"
    assert line in said.replace("\n", "")
    assert check(path, "--image-dir", str(target))[0] == 0


def test_a_format_that_no_record_has_is_told(tmp_path: Path, check: Callable[..., Checked]) -> None:
    code, said, report = check(write_llava(tmp_path, 3), "--format", "messages")
    assert (code, report["counts"]) == (3, {"missing key": 3})
    assert "no record is of the format messages, they look like llava: leave --format out" in said


@pytest.mark.parametrize(
    ("name", "text", "hint"),
    [
        ("data.jsonl", '{"question": "?", "reply": "red"}\n', "its records have the keys question, reply"),
        ("data.jsonl", "", "holds no records"),
        ("data.csv", "a,a\n1,2\n", "must start with a line of column names, each once"),
        ("notes/0.txt", "hello", "holds no files of records (1 .txt)"),
        ("cut.json", '[{"conversations": [', "is no whole JSON list"),
    ],
)
def test_a_layout_that_nobody_knows_is_said_to_be_one(
    name: str, text: str, hint: str, tmp_path: Path, check: Callable[..., Checked]
) -> None:
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    code, said, report = check(path.parent if "/" in name else path)
    assert (code, report["exit_code"]) == (2, 2)
    assert hint in report["error"]
    assert report["error"] in said


def test_a_format_of_no_kind_is_told_with_the_nearest(tmp_path: Path, check: Callable[..., Checked]) -> None:
    (tmp_path / "a.jsonl").write_text("{}")
    code, said, _ = check(tmp_path / "a.jsonl", "--format", "llvaa")
    assert code == 2
    assert "no format 'llvaa': did you mean 'llava'? There are auto, llava" in said


def shard(path: Path, members: list[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def jpeg(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "JPEG")
    return file.getvalue()


def test_faults_in_tars_and_tables_are_told_by_file_and_row(tmp_path: Path, check: Callable[..., Checked]) -> None:
    good = jpeg(picture(0))
    (tmp_path / "tars").mkdir()
    shard(tmp_path / "tars" / "00000.tar", [("a.jpg", good), ("a.txt", b"red"), ("b.jpg", good), ("b.txt", b"blue")])
    shard(tmp_path / "tars" / "00001.tar", [("c.jpg", good[:-300]), ("c.txt", b"red"), ("d.jpg", good), ("d.txt", b"")])
    whole = (tmp_path / "tars" / "00001.tar").read_bytes()
    (tmp_path / "tars" / "00002.tar").write_bytes(whole[:1500])
    code, said, report = check(tmp_path / "tars")
    assert code == 2
    assert "captions, tar, 3 files" in said
    told = [(Path(finding["file"]).name, finding["kind"], finding["row"]) for finding in report["findings"]]
    assert told == [
        *[("00001.tar", "broken image", 0), ("00001.tar", "nothing to learn", 1)],
        ("00002.tar", "broken file", None),
    ]
    table = tmp_path / "data.tsv"
    table.write_text("image\tcaption\n" + "none.png\tred\n" + "none.png\n")
    assert found(check(table)[2]) == [("missing image", 0), ("bad record", 1)]


def test_squares_of_256_pixels_with_borders_are_warned_of(tmp_path: Path, check: Callable[..., Checked]) -> None:
    members = []
    for i in range(6):
        canvas = Image.new("RGB", (256, 256), "white")
        canvas.paste(picture(i, (256, 120) if i % 2 else (120, 256)), (0, 68) if i % 2 else (68, 0))
        side = picture(i, (200, 256))
        members += [(f"{i}.jpg", jpeg(canvas if i < 4 else side)), (f"{i}.txt", b"noise")]
    path = shard(tmp_path / "00000.tar", members)
    code, _, report = check(path)
    assert (code, report["counts"]) == (5, {"256-pixel squares": 1})
    assert report["findings"][0]["cause"].startswith("4 of 6 images have 256 x 256 pixels, 4 of them white borders")
    path = shard(tmp_path / "00000.tar", members[6:])
    assert check(path)[0] == 0


def test_records_left_out_on_purpose_are_no_faults(tmp_path: Path, check: Callable[..., Checked]) -> None:
    records = [{"texts": [{"user": "?", "assistant": "a"}], "images": [], "relevance_min": rated} for rated in (1, 5)]
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    code, said, report = check(path, "--format", "texts_images", "--options", "{min_rating: {relevance: 3}}")
    assert (code, report["filtered"], report["samples"]) == (0, 1, 1)
    assert "2 records (1 left out on purpose): 1 samples, 1 of them without images" in said
