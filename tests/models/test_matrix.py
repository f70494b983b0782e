"""The page of who loads which parts is every cell's own answer; other settings of the connectors compute too.

The plain cells are computed in `test_matrix_image_text.py` and `test_matrix_image_only.py`.
"""

from __future__ import annotations

import re
from itertools import product
from pathlib import Path

import pytest

import mllm
from models import grids, matrix
from models.cells import check
from models.grids import Answer
from models.matrix import ENCODERS, LLMS, PLAIN, VARIANTS, VARIED, Cell

VARIED_PAIRS = [
    Cell(encoder, connector, LLMS[number % len(LLMS)])
    for number, (encoder, connector) in enumerate(product(ENCODERS, VARIANTS))
]


@pytest.mark.parametrize("cell", VARIED_PAIRS, ids=str)
def test_other_settings_of_a_connector_compute_pack_train_and_are_read_back(cell: Cell, tmp_path: Path) -> None:
    check(cell, tmp_path)


def told() -> str:
    _, _, rest = matrix.README.read_text().partition(matrix.BEGIN)
    page, found, _ = rest.partition(matrix.END)
    assert found
    return page


def test_page_is_drawn_anew_the_same() -> None:
    assert told() == matrix.page(), "python tests/models/matrix.py writes it anew"


@pytest.mark.parametrize("who", [0, 1], ids=["stock class", "llama.cpp"])
def test_what_a_person_reads_on_the_page_is_every_cells_own_answer(who: int) -> None:
    read = grids.read(re.split(r"^\*\*.+?\*\* \w+ \d+ of", told(), flags=re.MULTILINE)[1 + who])
    own = {(cell.encoder, cell.connector, cell.llm): matrix.answers(cell)[who] for cell in PLAIN + VARIED}
    assert {names for names in own if own[names] != read[names]} == set()
    assert read.keys() == own.keys()


def test_every_stock_class_of_the_exporter_stands_on_the_page() -> None:
    """Settings that no plain cell has belong into `VARIANTS`. LlavaNext is Llava over tiles: no cell has any."""
    source = (Path(mllm.__file__).parent / "export" / "homes.py").read_text()
    classes = set(re.findall(r'"(\w+)ForConditionalGeneration"', source))
    assert classes - {"LlavaNext"} == {matrix.answers(cell)[0].yes for cell in PLAIN + VARIED} - {""}


# ---------------------------------------------------------------- how it is drawn

SMALL = [Cell(*names) for names in product("ab", "xy", "123")]


def test_llm_that_adds_a_reason_everywhere_shares_a_grid_and_another_one_gets_its_own() -> None:
    answers = {cell: Answer("Llava") for cell in SMALL}
    for cell in SMALL:
        if cell.encoder == "b":
            answers[cell] = Answer("", frozenset({"b is odd"}))
        if cell.llm == "2":
            answers[cell] = answers[cell].with_reasons(frozenset({"2 is even"}))
    answers[Cell("a", "y", "3")] = Answer("VipLlava")
    text = grids.draw(answers)
    assert grids.read(text) == {(cell.encoder, cell.connector, cell.llm): answer for cell, answer in answers.items()}
    assert "| `1` | A |  |\n| `2` | A | 2 |\n| `3` | B |  |\n" in text
    assert text.endswith("1. b is odd\n2. 2 is even\n")
