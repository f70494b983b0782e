"""The shapes data set keeps its promises: seeded, strictly held out, balanced, and with right answers.

One small set is drawn for all tests; they read its files, as a training run would.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1] / "data_scripts"))

import make_tiny
from shapes import questions, scenes

SIZES = {"images": 60, "held_out_images": 40, "texts": 80}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("shapes")
    make_tiny.main(out, **SIZES)
    return out


def read(path: Path) -> Any:
    text = path.read_text()
    return [json.loads(line) for line in text.splitlines()] if path.suffix == ".jsonl" else json.loads(text)


def scenes_of(data: Path, split: str) -> list[list[Any]]:
    drawn = read(data / "scenes.json")
    return [[scenes.Thing(*thing) for thing in scene] for path, scene in drawn.items() if f"/{split}/" in path]


def pairs_said(path: Path) -> set[tuple[str, str]]:
    found = re.findall(rf"({'|'.join(scenes.COLOURS)}) ({'|'.join(scenes.OUTLINES)})\b", path.read_text())
    return set(found)


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_same_seed_draws_the_same_files(data: Path, tmp_path: Path) -> None:
    make_tiny.main(tmp_path, **SIZES)
    assert files_of(tmp_path) == files_of(data)


def test_another_seed_draws_other_scenes(data: Path, tmp_path: Path) -> None:
    make_tiny.main(tmp_path, **SIZES, seed=1)
    assert read(tmp_path / "scenes.json") != read(data / "scenes.json")


@pytest.mark.parametrize("file", ["captions.jsonl", "train.json", "plain.json", "texts.jsonl"])
def test_held_out_pairs_are_never_said_outside_compositional(data: Path, file: str) -> None:
    assert not pairs_said(data / file) & scenes.HELD_OUT


@pytest.mark.parametrize("split", ["train", "plain"])
def test_held_out_pairs_are_never_drawn_outside_compositional(data: Path, split: str) -> None:
    assert not {thing.pair for scene in scenes_of(data, split) for thing in scene} & scenes.HELD_OUT


def test_every_compositional_picture_holds_a_held_out_pair(data: Path) -> None:
    assert all(any(thing.pair in scenes.HELD_OUT for thing in scene) for scene in scenes_of(data, "compositional"))


def test_every_colour_and_shape_is_drawn_in_training(data: Path) -> None:
    things = [thing for scene in scenes_of(data, "train") for thing in scene]
    assert {thing.colour for thing in things} == set(scenes.COLOURS)
    assert {thing.shape for thing in things} == set(scenes.OUTLINES)


def test_pictures_are_64_by_64_rgb(data: Path) -> None:
    for path in (data / "images").rglob("*.png"):
        with Image.open(path) as picture:
            assert (picture.size, picture.mode) == ((64, 64), "RGB")


def test_no_two_things_share_a_quadrant(data: Path) -> None:
    for split in ("train", "plain", "compositional"):
        for scene in scenes_of(data, split):
            assert len({thing.place for thing in scene}) == len(scene)


def answered(scene: list[Any], question: str) -> str | None:
    """The answer to an existence question or to the count of all, found again from the scene alone."""
    if question == "How many shapes are there?":
        return str(len(scene))
    if asked := re.fullmatch(r"Is there an? (?:(\w+) )?(\w+)\?", question):
        colour, shape = asked.groups()
        fits = (colour in (None, thing.colour) and shape in ("shape", thing.shape) for thing in scene)
        return "yes" if any(fits) else "no"
    return None


@pytest.mark.parametrize("split", ["plain", "compositional"])
def test_answers_agree_with_the_scene(data: Path, split: str) -> None:
    drawn = read(data / "scenes.json")
    checked = 0
    for record in read(data / f"{split}.json"):
        question, told = (turn["value"] for turn in record["conversations"])
        scene = [scenes.Thing(*thing) for thing in drawn[record["image"]]]
        expected = answered(scene, question.removeprefix("<image>\n"))
        assert expected in (None, told)
        checked += expected is not None
    assert checked > 20


@pytest.mark.parametrize("split", ["plain", "compositional"])
def test_yes_and_no_are_balanced(data: Path, split: str) -> None:
    told = Counter(record["conversations"][1]["value"] for record in read(data / f"{split}.json"))
    assert 0.4 < told["yes"] / (told["yes"] + told["no"]) < 0.6


@pytest.mark.parametrize("split", ["plain", "compositional"])
def test_every_type_of_question_is_asked(data: Path, split: str) -> None:
    assert {record["type"] for record in read(data / f"{split}.json")} == set(questions.TYPES)


# ---------------------------------------------------------------- one of several pictures


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("several")
    make_tiny.main(out, **SIZES, images_per_question=3)
    return out


def test_questions_about_several_pictures_leave_all_else_as_it_was(data: Path, several: Path) -> None:
    before, after = files_of(data), files_of(several)
    assert {name for name in before if after[name] != before[name]} == {"scenes.json"}
    new = {name for name in set(after) - set(before) if "_one/" not in name}
    assert new == {"train_3.json", "plain_3.json"}


@pytest.mark.parametrize("split", ["train", "plain"])
def test_answer_is_that_of_the_picture_with_the_asked_number_and_of_no_other(several: Path, split: str) -> None:
    drawn, numbers = read(several / "scenes.json"), Counter()
    for record in read(several / f"{split}_3.json"):
        question, told = (turn["value"] for turn in record["conversations"])
        opening = "image 1: <image>\nimage 2: <image>\nimage 3: <image>\n"
        asked = re.fullmatch(
            r"What (colour is the|kind of) shape (?:is )?in image (\d)\?", question.removeprefix(opening)
        )
        assert asked
        attribute = "colour" if "colour" in asked[1] else "shape"
        (things,) = zip(*[drawn[path] for path in record["image"]], strict=True)  # one thing a picture
        answers = [getattr(scenes.Thing(*thing), attribute) for thing in things]
        assert record["asked"] == int(asked[2])
        assert record["type"] == attribute
        assert told == answers[record["asked"] - 1]
        assert len(set(answers)) == 3
        numbers[record["asked"]] += 1
    assert min(numbers.values()) > 0.2 * numbers.total()


def test_held_out_pairs_stay_out_of_pictures_that_are_shown_together(several: Path) -> None:
    things = [thing for split in ("train_one", "plain_one") for scene in scenes_of(several, split) for thing in scene]
    assert len(things) == SIZES["images"] // 3 + SIZES["held_out_images"]
    assert not {thing.pair for thing in things} & scenes.HELD_OUT


@pytest.mark.parametrize("together", [0, 5])
def test_numbers_of_pictures_that_cannot_all_differ_are_refused(tmp_path: Path, together: int) -> None:
    with pytest.raises(ValueError, match="expected 1 to 4"):
        make_tiny.main(tmp_path, **SIZES, images_per_question=together)


def test_no_pictures_at_all_are_a_mistake_in_one_line(tmp_path: Path) -> None:
    command = [sys.executable, make_tiny.__file__, "--out", str(tmp_path / "data"), "--images", "0"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr.splitlines()[-1][:18]) == (2, "error: --images 0 ")
    assert not (tmp_path / "data").exists()


def test_parts_without_their_data_are_a_mistake_in_one_line(tmp_path: Path) -> None:
    script = Path(make_tiny.__file__).parents[1] / "recipes/tiny/parts.py"
    command = [sys.executable, str(script), "--data", str(tmp_path / "none"), "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr.splitlines()[-1][:9]) == (2, "error: no")
    assert "data_scripts/make_tiny.py" in done.stderr


def test_too_few_pictures_to_be_shown_together_are_an_error_in_words(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="draw more pictures"):
        make_tiny.main(tmp_path, images=6, held_out_images=2, texts=1, images_per_question=3)
