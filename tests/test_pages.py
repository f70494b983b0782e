"""What the pages of the house say is there: their links, the tests that they name; and what its programs import."""

from __future__ import annotations

import ast
import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = sorted(path for path in ROOT.glob("*.md")) + sorted(
    path for folder in ("data_scripts", "recipes", "tests") for path in (ROOT / folder).rglob("README.md")
)
PROGRAMS = sorted(path for folder in ("data_scripts", "recipes") for path in (ROOT / folder).rglob("*.py"))


def anchors(page: Path) -> set[str]:
    """Its headings, as links name them."""
    heads = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_of_a_page_leads_somewhere_and_every_test_that_it_names_is_there(page: Path) -> None:
    text = page.read_text()
    for link in re.findall(r"\]\((?!https?:)([^)]+)\)", text):
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link
    for name in re.findall(r"`(tests/[\w/]+\.py)`", text):
        assert (ROOT / name).is_file(), name


def test_every_name_that_a_program_takes_from_the_house_is_there() -> None:
    """No type checker reads the programs, and some are started on devices alone."""
    taken = {
        (part.module, alias.name)
        for path in PROGRAMS
        for part in ast.walk(ast.parse(path.read_text()))
        if isinstance(part, ast.ImportFrom) and part.module and part.module.partition(".")[0] == "mllm"
        for alias in part.names
    }
    assert ("mllm.assembly", "build_processor") in taken
    missing = [f"{module}.{name}" for module, name in sorted(taken) if not has(module, name)]
    assert not missing


def has(module: str, name: str) -> bool:
    """In the module, or a module beside it; what needs a library that is not installed is believed."""
    try:
        return hasattr(importlib.import_module(module), name) or bool(importlib.import_module(f"{module}.{name}"))
    except ModuleNotFoundError as error:
        return not (error.name or "").startswith("mllm")
