"""Every cell of the matrix, exported: a process that cannot import mllm says what the trained model says.

The fast suite takes a few cells in which every part and every class occurs, the long one all of them, under both
versions of transformers.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from export.cells import Written, faults, prove_in_one_process, write_cell, write_parts
from mllm.export.environments import HERE
from mllm.export.proof import Proof
from models.matrix import ENCODERS, PLAIN, VARIED, Cell, answers
from test_transformers import OLD, needs_old, old_environment

ALL = PLAIN + VARIED


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_parts(tmp_path_factory.mktemp("parts"))


def traits(cell: Cell) -> set[tuple[str, str]]:
    """What of the matrix a cell stands for."""
    kinds = ("encoder", "connector", "llm", "class")
    return set(zip(kinds, (cell.encoder, cell.connector, cell.llm, answers(cell)[0].yes), strict=True))


def few() -> list[Cell]:
    """As many cells as it takes to see every trait; each is the first of those that show most new ones."""
    missing, chosen = set().union(*map(traits, ALL)), []
    while missing:
        chosen.append(max(ALL, key=lambda cell: len(traits(cell) & missing)))
        missing -= traits(chosen[-1])
    return chosen


@pytest.fixture(scope="module")
def written(parts: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Written]:
    return [write_cell(cell, parts, tmp_path_factory.mktemp(str(cell))) for cell in few()]


@pytest.fixture(scope="module")
def proven(written: list[Written], tmp_path_factory: pytest.TempPathFactory) -> list[Proof]:
    """Of the few, of one whose answers are another model's, of one that is said to be of another class."""
    wrong = [replace(written[0], reference=written[1].reference), replace(written[0], architecture="AnotherClass")]
    return list(prove_in_one_process([*written, *wrong], HERE, tmp_path_factory.mktemp("process")))


def test_every_part_and_every_class_says_the_same_in_a_process_without_mllm(
    written: list[Written], proven: list[Proof]
) -> None:
    assert faults(proven[: len(written)], written) == {}
    assert all(proof.samples == 3 for proof in proven[: len(written)])


def test_cell_with_other_weights_or_class_is_noticed(proven: list[Proof]) -> None:
    *_, swapped, renamed = proven
    assert any("differ" in fault for fault in swapped.faults)
    assert [fault.partition(", not a ")[2] for fault in renamed.faults] == ["AnotherClass"]


@needs_old
def test_transformers_4_57_says_it_of_them_too(written: list[Written], tmp_path: Path) -> None:
    proofs = list(prove_in_one_process(written, old_environment(), tmp_path))
    assert faults(proofs, written) == {}
    assert {proof.transformers[:4] for proof in proofs} == {"4.57"}


@pytest.mark.long
@pytest.mark.parametrize("kind", [PLAIN, VARIED], ids=["plain", "varied"])
@pytest.mark.parametrize("encoder", ENCODERS)
def test_every_cell_does_under_both_versions(encoder: str, kind: list[Cell], parts: Path, tmp_path: Path) -> None:
    written = [write_cell(cell, parts, tmp_path / str(cell)) for cell in kind if cell.encoder == encoder]
    wrong = {}
    for environment in (HERE, *([old_environment()] if OLD else [])):
        proofs = list(prove_in_one_process(written, environment, tmp_path))
        worst, version = max(proof.logits for proof in proofs), proofs[0].transformers
        print(f"{encoder}: {len(proofs)} cells, transformers {version}, logits within {worst:.1e}")
        wrong |= {f"{cell} under {version}": why for cell, why in faults(proofs, written).items()}
    assert wrong == {}
