"""The converter of the public easy-VQA set, on a set of the same layout."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import pytest

from conftest import picture
from mllm.data.formats.llava import read_llava
from scripts import load_script


@pytest.fixture(scope="module")
def converter() -> ModuleType:
    return load_script("easy_vqa")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "easy-vqa" / "train"
    (folder / "images").mkdir(parents=True)
    questions = []
    for number in range(10):
        picture(number).save(folder / "images" / f"{number}.png")
        questions += [["what color is the shape?", "red", number], ["what shape is present?", "circle", number]]
        questions.append(["is there a teal shape?", "no", number])
    (folder / "questions.json").write_text(json.dumps(questions))
    return folder.parent


def test_no_held_out_picture_is_trained_on(converter: ModuleType, source: Path, tmp_path: Path) -> None:
    converter.main(source, tmp_path / "out", held_out=3)
    held, trained = (read_llava(tmp_path / "out" / f"{split}.json") for split in ("heldout", "train"))
    pictures = [{str(sample.images[0]) for sample in samples} for samples in (held, trained)]
    assert (len(held), len(trained)) == (9, 21)
    assert not pictures[0] & pictures[1]
    captions = (tmp_path / "out" / "captions.jsonl").read_text().splitlines()
    assert {json.loads(line)["image"] for line in captions} == {
        str(Path(name).relative_to(tmp_path / "out")) for name in pictures[1]
    }


def test_type_of_a_question_is_what_it_asks_for(converter: ModuleType, source: Path, tmp_path: Path) -> None:
    converter.main(source, tmp_path / "out", held_out=3)
    types = {sample.messages[1].text: sample.meta["type"] for sample in read_llava(tmp_path / "out" / "heldout.json")}
    assert types == {"red": "colour", "circle": "shape", "no": "yes/no"}


def test_wrong_source_folder_is_named(converter: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"questions\.json"):
        converter.main(tmp_path, tmp_path / "out")
