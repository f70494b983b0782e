"""The statistics add up to the index, the page needs nothing else, and both say what is wrong with the data."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from conftest import IMAGE_SIZE, PATCH, make_processor, picture, write_llava
from mllm.data.curation.statistics import histogram, statistics
from mllm.data.curation.word_counter import BEGINNING, WordCounter
from mllm.data.formats.llava import LlavaSource
from mllm.data.formats.messages import MessagesSource
from mllm.data.index import Index, build_index
from mllm.data.planning import advisor
from mllm.evaluate.data_report.charts import ticks
from mllm.evaluate.data_report.words import short
from scripts import load_script

UNCUT = 2**30


script = load_script("stats")


def chats(path: Path, *pairs: tuple[str, str]) -> Path:
    """Text alone: what the user asks and the assistant says."""
    lines = [
        {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]}
        for asked, said in pairs
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`data.json`: ten conversations about pictures of two sizes, one more about a broken one; `chats.jsonl`: text."""
    folder = tmp_path_factory.mktemp("stats")
    write_llava(folder, records=11)
    picture(0, (64, 48)).save(folder / "images" / "0.png")
    (folder / "images" / "10.png").write_bytes(b"no picture")
    records = json.loads((folder / "data.json").read_text())
    records[1]["image"] = ["images/1.png", "images/2.png"]
    records[1]["conversations"][0]["value"] = "<image><image>\nwhich <script>?"
    (folder / "data.json").write_text(json.dumps(records))
    chats(folder / "chats.jsonl", ("hello there", "hi"), ("why?", "because " * 60), ("a b c", "d e"))
    return folder


def index_of(folder: Path, processor: Any = None) -> Index:
    sources = [LlavaSource(folder / "data.json"), MessagesSource(folder / "chats.jsonl")]
    return build_index(sources, processor or make_processor(), UNCUT, progress=False)


@pytest.fixture(scope="module")
def index(folder: Path) -> Index:
    return index_of(folder)


@pytest.fixture(scope="module")
def numbers(index: Index) -> dict[str, Any]:
    return statistics(index, seq_length=192)


# --------------------------------------------------------------------------------------------------------- numbers


def test_sums_are_those_of_the_index(index: Index, numbers: dict[str, Any]) -> None:
    assert numbers["samples"] == len(index) == 13
    assert numbers["read"] == index.read == 14
    assert numbers["images"] == index.num_images == 11
    assert numbers["length"] == index.length.sum()
    assert numbers["supervised"] == index.supervised.sum()
    assert numbers["faults"] == {"image": 1}


@pytest.mark.parametrize("key", ["samples", "images", "length", "supervised"])
def test_sources_sum_to_the_whole(numbers: dict[str, Any], key: str) -> None:
    assert [line["name"] for line in numbers["sources"]] == ["data.json", "chats.jsonl"]
    assert sum(line[key] for line in numbers["sources"]) == numbers[key]


def test_every_histogram_counts_each_sample_or_image_once(numbers: dict[str, Any]) -> None:
    counts = np.array(numbers["lengths"]["counts"])
    assert counts.sum(axis=1).tolist() == [line["samples"] for line in numbers["sources"]]
    assert sum(numbers["supervised_shares"]) == sum(numbers["images_per_sample"].values()) == 13
    assert numbers["images_per_sample"] == {"0": 3, "1": 9, "2": 1}
    assert np.sum(numbers["image_sizes"]["counts"]) == 11
    assert numbers["image_sizes"]["commonest"] == [[32, 32, 10], [64, 48, 1]]


@pytest.mark.parametrize(
    "values", [[5], [3, 3, 3], [1, 40], list(range(1, 500)), [*range(20, 60)] * 9 + [9000], [0, 1]]
)
def test_a_histogram_has_room_for_every_value(values: list[int]) -> None:
    told = histogram(np.array(values), np.zeros(len(values), int), 1)
    edges = told["edges"]
    assert sum(told["counts"][0]) == len(values)
    assert edges == sorted(set(edges))
    assert len(edges) <= 50
    assert told["is_log"] == (max(values) == 9000)


def test_fill_is_the_advisors(index: Index, numbers: dict[str, Any]) -> None:
    fill = dict(zip(numbers["fill"]["seq_length"], numbers["fill"]["fill"], strict=True))
    for row in (192, 512, 4096):
        cut = np.minimum(index.length, row)
        assert fill[row] == pytest.approx(advisor.fills(cut, [row])[0].fill, abs=1e-4)
    longer = (index.length > 192).mean()
    assert numbers["fill"]["cut"][0] == pytest.approx(longer, abs=1e-4)
    assert numbers["fill"]["chosen"] == 192
    assert numbers["fill"]["best"] >= index.length.max()


def test_words_are_counted_where_there_is_no_tokenizer(folder: Path) -> None:
    numbers = statistics(index_of(folder, WordCounter()), "words", shift=BEGINNING)
    [_, chats] = numbers["sources"]
    assert (chats["length"], chats["supervised"]) == (2 + 1 + 1 + 60 + 3 + 2, 1 + 60 + 2)
    assert numbers["fill"] is None


def test_first_words_of_a_caption_count_as_learned(tmp_path: Path) -> None:
    chats(tmp_path / "data.jsonl", ("", "a red circle"))
    index = build_index([MessagesSource(tmp_path / "data.jsonl")], WordCounter(), UNCUT, progress=False)
    numbers = statistics(index, "words", shift=BEGINNING)
    assert (numbers["length"], numbers["supervised"], numbers["supervised_share"]) == (3, 3, 1.0)


def test_sources_of_one_name_are_told_apart(folder: Path) -> None:
    source = MessagesSource(folder / "chats.jsonl")
    index = build_index([source, source], make_processor(), UNCUT, progress=False)
    assert [line["name"] for line in statistics(index)["sources"]] == ["chats.jsonl", "chats.jsonl (2)"]


# ------------------------------------------------------------------------------------------------------------ report


@pytest.fixture(scope="module")
def report(folder: Path, hub: Path) -> Path:
    """Written by the script with a tokenizer and four visual tokens an image, as the index of the other tests."""
    out = folder / "report"
    paths = (str(folder / "data.json"), str(folder / "chats.jsonl"))
    script.main(paths, out, llm=str(hub / "llm"), image_tokens=4, seq_length=192, number_shown=2, workers=0)
    return out


def test_the_file_of_numbers_is_the_statistics(report: Path, numbers: dict[str, Any]) -> None:
    told = json.loads((report / "stats.json").read_text())
    assert {key: told[key] for key in numbers} == json.loads(json.dumps(numbers))


def test_longest_and_shortest_are_shown_with_their_place(report: Path, index: Index) -> None:
    told = json.loads((report / "stats.json").read_text())
    lengths = sorted(index.length.tolist())
    assert [each["length"] for each in told["longest"]] == lengths[:-3:-1]
    assert [each["length"] for each in told["shortest"]] == lengths[:2]
    assert told["longest"][0]["where"].endswith("chats.jsonl, row 1")
    assert told["longest"][0]["text"].startswith("user: why?\nassistant: because")
    assert "thumbnail" not in told["shortest"][0]


def test_the_page_stands_alone_and_escapes_what_data_says(report: Path) -> None:
    page = (report / "stats.html").read_text()
    assert not re.findall(r"https?://|<script|@import|url\(", page)
    assert set(re.findall(r'src="(.{23})', page)) == {"data:image/jpeg;base64,"}
    assert "which &lt;script&gt;?" in page
    assert page.count("<svg") == 5
    assert "unreadable: image" in page


def test_the_picture_is_drawn(report: Path) -> None:
    with Image.open(report / "stats.png") as drawn:
        assert drawn.width > 1500
        assert len(drawn.convert("RGB").getcolors(2**24) or []) > 100


def test_one_short_text_is_data_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = chats(tmp_path / "$one_$.jsonl", ("x", "yes"))
    script.main((str(path),), tmp_path / "out", workers=0)
    assert (tmp_path / "out" / "stats.html").read_text().count("<svg") == 3  # no images, and no fill without tokens
    assert "2 words" in capsys.readouterr().out


def test_a_recipe_is_counted_as_it_would_train(folder: Path, hub: Path, tmp_path: Path) -> None:
    config = {
        "model": {"vision_encoder": str(hub / "encoder"), "llm": str(hub / "llm")},
        "data": {"sources": [{"format": "llava", "path": str(folder / "data.json")}], "seq_length": 128},
        "train": {"output_dir": str(tmp_path / "run"), "learning_rate": {"connector": 1e-3}},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    script.main((), tmp_path / "out", config=tmp_path / "run.yaml", workers=0, number_shown=0)
    told = json.loads((tmp_path / "out" / "stats.json").read_text())
    visual_tokens = (IMAGE_SIZE // PATCH) ** 2
    index = build_index([LlavaSource(folder / "data.json")], make_processor(visual_tokens), UNCUT, progress=False)
    assert (told["length"], told["fill"]["chosen"]) == (index.length.sum(), 128)


# ---------------------------------------------------------------------------------------------------------- mistakes


def test_data_of_faults_alone_is_an_error_that_tells_the_first(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text('{"messages": []}\n')
    with pytest.raises(ValueError, match=r"no sample can be read.*row 0: the conversation is empty"):
        script.main((str(path),), tmp_path / "out", workers=0)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([], "give data files or --config"),
        (["data.jsonl", "--config", "run.yaml"], "give data files or --config"),
        (["nowhere.json"], "no data file nowhere.json"),
        (["data.jsonl", "--image-tokens", "4"], "--image-tokens needs a tokenizer"),
        (["data.jsonl", "--llm", "nowhere"], "no tokenizer at 'nowhere'"),
    ],
)
def test_mistakes_are_told_in_words(
    tmp_path: Path,
    arguments: list[str],
    told: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    chats(tmp_path / "data.jsonl", ("x", "y"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["stats.py", *arguments, "--out", "out"])
    assert script.door() == 2
    assert told in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------------ charts


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0, 7), (0, 12345), (3, 4), (0.5, 0.6)])
def test_an_axis_has_a_few_round_values(low: float, high: float) -> None:
    found = ticks(low, high, False)
    assert 2 <= len(found) <= 6
    assert all(low - 1e-9 <= value <= high + 1e-9 for value in found)


@pytest.mark.parametrize(("number", "told"), [(7, "7"), (9999, "9,999"), (58_400, "58.4 k"), (2_060_000, "2.06 M")])
def test_large_numbers_are_told_in_three_digits(number: int, told: str) -> None:
    assert short(number) == told
