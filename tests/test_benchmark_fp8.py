"""What the benchmark says of 8-bit floats: measured as the run's gate measures, and kept."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from test_benchmark import RECIPES, run

sys.path.append(str(RECIPES))

from benchmarks.fp8_cosines import GATE, asked, drawn_rows, narrow
from benchmarks.fp8_curve import ASKED, compared, smoothed
from benchmarks.fp8_report import SIZES, cosine_table, curve_table
from benchmarks.page import markdown, read_results
from mllm.train.tuning.fp8_gate import FURTHEST, LEAST


def test_products_turn_the_gradient_more_than_gradients_and_the_first_blocks_more_than_the_last() -> None:
    found = asked(narrow("7B", 16, layers=4), drawn_rows(1))
    cosine = {words: way["cosine"] for words, way in found["ways"].items()}
    share = {words: way["share"] for words, way in found["ways"].items()}
    assert cosine["gate 4: no products"] > LEAST > cosine["products, no gradients"]
    first, last = (f"all but the {which} quarter of the blocks" for which in ("first", "last"))
    assert cosine[first] > cosine["all but q_proj, k_proj, v_proj, o_proj"] > cosine["all"]
    assert cosine[first] > LEAST > cosine[last]
    assert share[first] == share[last] == 0.75
    assert [share[words] for words in GATE] == [0.875, 0.875, 0.75, 0.5, 0.25]
    assert found["ways"]["gate 4: no products"]["loss"] == 0 != found["ways"]["all"]["loss"]
    assert cosine["all"] < LEAST <= cosine[found["chosen"]]
    assert abs(found["ways"][found["chosen"]]["loss"]) <= FURTHEST


def test_curves_are_compared_by_the_means_of_their_neighbours() -> None:
    plain = [2.0, 4.0] * 10
    assert smoothed(plain) == [3.0] * 11
    assert smoothed([1.0, 3.0]) == [2.0]
    assert compared(plain, [4.0, 2.0] * 10) == {"worst": 0, "at": 1, "mean": 0}
    late = compared(plain, [2.0, 4.0] * 9 + [2.0, 3.7])
    assert late == {"worst": pytest.approx(0.01), "at": 11, "mean": pytest.approx(-0.01 / 11)}


def test_a_number_of_rows_below_one_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit, match="--rows is 0: give a positive number"):
        run(monkeypatch, "fp8", "--rows", 0)


def test_what_is_on_the_page_keeps_what_is_asked() -> None:
    found = read_results()["fp8-cpu"]
    assert found["models"].keys() == SIZES.keys()
    for model in found["models"].values():
        assert model["ways"][model["chosen"]]["least"] >= LEAST
    curve = found["curve"]
    assert curve["asked"] == ASKED
    for name, far in curve["difference"].items():
        assert far == pytest.approx(compared(curve["losses"]["plain"], curve["losses"][name]))
    gate, everything = curve["difference"]["gate"], curve["difference"]["all"]
    assert abs(gate["mean"]) < ASKED < everything["mean"]  # what the gate is for
    page = markdown(cosine_table(found)) + markdown(curve_table(found))
    assert page.count(" taken ") == len(SIZES)
    assert (" met " in page.splitlines()[-1]) == (gate["worst"] <= ASKED)


@pytest.mark.long
def test_the_command_makes_what_is_missing_and_writes_all_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "out.json"
    monkeypatch.setattr("benchmarks.fp8_curve.DEEP_STEPS", 2)
    run(monkeypatch, "fp8", "--home", tmp_path / "home", "--rows", 1, "--steps", 2, "--json", path)
    found = json.loads(path.read_text())
    assert found["models"].keys() == SIZES.keys()
    assert found["models"]["deep"]["blocks"] == 8
    assert [len(losses) for losses in found["curve"]["losses"].values()] == [2, 2, 2, 2]
    assert found["curve"]["taken"]["all"]["share"] == 1
