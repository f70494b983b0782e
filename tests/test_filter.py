"""The filter removes what was planted and nothing else, says why, and goes on where it was stopped."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from conftest import make_processor, picture
from filtering import caption, lines, painting, pictures, run, script, write
from mllm.data.curation.filters import text
from mllm.data.curation.filters.measure import Blocks
from mllm.data.curation.filters.rules import LIMITS, Rules
from mllm.data.formats.captions import CaptionsSource
from mllm.data.index import build_index

pytestmark = pytest.mark.usefixtures("alone")


# ------------------------------------------------------------------------------------------- rules of text and size

GOOD = "A red circle stands left of two small squares."
PLANTED = {
    "min_characters": (5, "red"),
    "max_characters": (60, "a circle on a chair under a table in a house on a hill by the sea"),
    "min_words": (3, "red circle"),
    "max_words": (10, "a circle and a square and a cross and a line"),
    "max_repetition": (0.3, "buy it now! Buy it now, buy it now."),
    "max_run": (5, "a red circle ------- and so on"),
    "max_non_letters": (0.4, "IMG 20240112 0034.JPG 1200x800"),
    "max_urls": (0.3, "a shop at https://shop.example.com/items?id=1"),
    "max_capitals": (0.6, "THE BEST RED CIRCLE EVER SEEN"),
}


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("planted")
    said = {"good": GOOD} | {rule: words for rule, (_, words) in PLANTED.items()}
    return write(folder, [caption(rule, words) for rule, words in said.items()])


@pytest.mark.parametrize("rule", PLANTED)
def test_a_rule_of_text_removes_what_was_planted_for_it_and_keeps_a_good_sentence(planted: Path, rule: str) -> None:
    removed = run(planted, planted.parent / "out", Rules(**{rule: PLANTED[rule][0]}))
    assert removed[f"{rule}#0"] == rule
    assert "good#0" not in removed


def test_all_rules_of_text_together_keep_a_good_sentence(planted: Path) -> None:
    removed = run(planted, planted.parent / "out", Rules(**{rule: limit for rule, (limit, _) in PLANTED.items()}))
    assert [line["id"] for line in lines(planted.parent / "out" / "kept.jsonl")] == ["good#0"]
    assert set(removed) == {f"{rule}#0" for rule in PLANTED}


def test_every_limit_has_an_option_and_a_planted_case_or_a_test_below() -> None:
    told = {rule for rule, _, _ in LIMITS}
    assert told <= set(Rules.__dataclass_fields__)
    assert told == {*PLANTED, "min_side", "max_side", "max_aspect", "min_clip", "min_score"}


@pytest.mark.parametrize(
    ("words", "count"),
    [("don't stop, please", 3), ("一只红色的猫", 6), ("लाल वृत्त", 2), ("- * -", 0), ("猫 cat 2", 3), ("", 0)],
)
def test_words_are_counted_in_any_script(words: str, count: int) -> None:
    assert len(text.words_of(words)) == count


def test_scripts_without_capitals_and_with_vowel_signs_are_letters_and_no_shouting() -> None:
    measured = text.measure_text("लाल वृत्त हिन्दी में")
    assert (measured["capitals"], measured["non_letters"]) == (0, 0)


def test_images_are_judged_by_the_worst_and_text_alone_is_kept(tmp_path: Path) -> None:
    sizes = {"small": (30, 40), "long": (400, 50), "large": (300, 300), "fine": (100, 80)}
    for name, size in sizes.items():
        picture(0, size).save(tmp_path / f"{name}.png")
    turns = [{"from": "human", "value": "<image><image>?"}, {"from": "gpt", "value": "two"}]
    records = [
        {"id": f"{one}-{other}", "image": [f"{one}.png", f"{other}.png"], "conversations": turns}
        for one, other in [("fine", "fine"), ("fine", "small"), ("long", "fine"), ("fine", "large")]
    ]
    alone = {"id": "alone", "conversations": [{**turns[0], "value": "hello?"}, turns[1]]}
    path = write(tmp_path, [*records, alone], "data.json")
    removed = run(path, tmp_path / "out", Rules(min_side=40, max_aspect=3, max_side=250))
    assert removed == {"fine-small": "min_side", "long-fine": "max_side", "fine-large": "max_side"}
    [also] = [line["also"] for line in lines(tmp_path / "out" / "removed.jsonl") if line["id"] == "long-fine"]
    assert also == ["max_aspect: aspect 8, most 3"]


# ------------------------------------------------------------------------------------------------- ledger and resume


@pytest.fixture
def faulty(tmp_path: Path) -> Path:
    """Six samples: three good ones, two of which bear one id; a broken image; a bad record; a line that is no JSON."""
    path = pictures(tmp_path, a=painting(1), b=painting(2))
    (tmp_path / "broken.png").write_bytes(b"no picture")
    path.write_text(
        path.read_text()
        + "".join(json.dumps(line) + "\n" for line in (caption("a"), caption("broken"), {"id": "x", "image": "a.png"}))
        + "{no json\n"
    )
    return path


def test_what_is_read_is_kept_or_removed_and_faults_are_named(faulty: Path) -> None:
    out = faulty.parent / "out"
    script.main(str(faulty), out, Rules(min_side=1), workers=0, format="captions")
    summary = json.loads((out / "summary.json").read_text())
    assert (summary["read"], summary["kept"], summary["by_rule"]) == (6, 3, {"unreadable": 3})
    removed = lines(out / "removed.jsonl")
    assert [line["where"].rpartition(" ")[2] for line in removed] == ["3", "4", "5"]
    assert ["image: cannot read" in removed[0]["reason"], "caption" in removed[1]["reason"]] == [True, True]
    assert len(lines(out / "kept.jsonl")) + len(removed) == summary["read"]


def test_kept_ids_are_those_of_the_index(faulty: Path) -> None:
    script.main(str(faulty), faulty.parent / "out", Rules(min_side=1), workers=0, format="captions")
    index = build_index([CaptionsSource(faulty)], make_processor(), 200, progress=False)
    kept = [line["id"] for line in lines(faulty.parent / "out" / "kept.jsonl")]
    assert kept == index.ids.to_pylist() == ["a#0", "b#0", "a#0~1"]


def test_a_run_that_was_stopped_goes_on_and_ends_with_the_same_lists(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = pictures(tmp_path, **{f"p{n}": picture(n) for n in range(200)})  # four blocks
    rules = Rules(duplicates=6, min_side=20)
    run(path, tmp_path / "whole", rules)
    measured: list[int] = []
    measure = Blocks.__getitem__

    def counted(blocks: Blocks, number: int) -> Any:
        measured.append(number)
        if len(measured) == 3:
            raise KeyboardInterrupt
        return measure(blocks, number)

    monkeypatch.setattr(Blocks, "__getitem__", counted)
    with pytest.raises(KeyboardInterrupt):
        run(path, tmp_path / "out", rules)
    with (tmp_path / "out" / "measured" / "rank0.jsonl").open("a") as file:
        file.write('{"block": 2, "kinds": ["look", "si')  # the power went off
    run(path, tmp_path / "out", rules)
    assert measured == [0, 1, 2, 2, 3]
    for name in ("kept.jsonl", "removed.jsonl", "scores.jsonl"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_overwriting_removes_no_files_of_others(tmp_path: Path) -> None:
    path = write(tmp_path, [caption("a")])
    (tmp_path / "out" / "measured").mkdir(parents=True)
    (tmp_path / "out" / "measured" / "thesis.tex").write_text("years")
    with pytest.raises(ValueError, match="holds other files"):
        run(path, tmp_path / "out", overwrite=True)


def test_a_dry_run_tells_and_writes_no_lists(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path, [caption("a"), caption("b", "two")])
    script.main(str(path), tmp_path / "out", Rules(min_words=3), workers=0, dry_run=True, json_output=True)
    assert json.loads(capsys.readouterr().out)["by_rule"] == {"min_words": 1}
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["measured"]


def test_the_table_tells_rule_limit_and_share(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(write(tmp_path, [caption("a"), caption("b", "two")]), tmp_path / "out", Rules(min_words=3))
    said = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["min_words", "3", "1", "50.0%"] in said
    assert ["kept", "1", "50.0%"] in said


# ---------------------------------------------------------------------------------------------------- kept records


@pytest.mark.parametrize("name", ["data.json", "data.jsonl"])
def test_kept_records_are_written_as_they_were(tmp_path: Path, name: str) -> None:
    records = [caption("a", "ein roter Kreis, größer als 1.50"), caption("b", "no"), caption("c", price=1e-7)]
    path = write(tmp_path, records, name)
    run(path, tmp_path / "out", Rules(min_words=3), records=True)
    text = (tmp_path / "out" / "records" / name).read_text()
    assert all(json.dumps(record) in text for record in (records[0], records[2]))
    again = CaptionsSource(tmp_path / "out" / "records" / name, image_dir=tmp_path)
    before = [sample for sample in CaptionsSource(path).read() if sample.id != "b#0"]
    kept = [(sample.id, sample.messages, sample.images) for sample in again.read()]
    assert kept == [(sample.id, sample.messages, sample.images) for sample in before]


def test_of_several_captions_only_those_that_stay_are_written(tmp_path: Path) -> None:
    several = {"id": "a", "image": "a.png", "captions": ["a red circle", "no", "two small squares"]}
    path = write(tmp_path, [several, {**several, "id": "b", "captions": ["no"]}])
    run(path, tmp_path / "out", Rules(min_words=3), records=True)
    [written] = lines(tmp_path / "out" / "records" / "data.jsonl")
    assert written == {**several, "captions": ["a red circle", "two small squares"]}


def test_of_several_kinds_of_caption_only_those_that_stay_are_written(tmp_path: Path) -> None:
    record = {"id": "a", "image": "a.png", "alt": "no", "dense": "a red circle"}
    kinds = "{text: {weights: {alt: 1, dense: 1}}}"
    run(write(tmp_path, [record]), tmp_path / "out", Rules(min_words=3), records=True, format="captions", options=kinds)
    [written] = lines(tmp_path / "out" / "records" / "data.jsonl")
    assert written == {"id": "a", "image": "a.png", "dense": "a red circle"}


def test_records_of_a_table_cannot_be_written_and_that_is_said_first(tmp_path: Path) -> None:
    path = tmp_path / "data.csv"
    path.write_text("id,image,caption\na,a.png,a red circle\n")
    with pytest.raises(ValueError, match="writes JSON lines and JSON lists"):
        run(path, tmp_path / "out", records=True)
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--min-clip", "0.3"], "--min-clip needs a model"),
        (["--min-score", "1"], "--scores and --min-score need each other"),
        (["--duplicates", "40"], "give 0 to 16 bits"),
        (["--benchmark", "nowhere"], "nowhere is no folder"),
        (["--workers", "-1"], "--workers is -1"),
    ],
)
def test_mistakes_are_told_in_words(
    tmp_path: Path,
    arguments: list[str],
    told: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = write(tmp_path, [caption("a")])
    monkeypatch.setattr(sys, "argv", ["filter.py", str(path), "--out", str(tmp_path / "out"), *arguments])
    assert script.door() == 2
    assert told in capsys.readouterr().err
