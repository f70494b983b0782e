"""What could not be written after long work is refused before it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from mllm.writable import check_file, check_folder


def test_a_place_that_can_be_made_is_let_pass_and_not_made(tmp_path: Path) -> None:
    check_folder(tmp_path / "a/b", "--out")
    check_file(tmp_path / "a/b/c.json", "--json")
    assert list(tmp_path.iterdir()) == []


def test_a_relative_name_starts_from_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    check_file(Path("c.json"), "--json")
    check_folder(Path("a/b"), "--out")


def test_a_folder_in_the_place_of_a_file_and_a_file_in_that_of_a_folder_are_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"--json .* is a folder: name a file"):
        check_file(tmp_path, "--json")
    with pytest.raises(ValueError, match=r"--out: .*file is a file"):
        check_folder(tmp_path / "file/a/b", "--out")


@pytest.mark.parametrize("there", [True, False])
def test_what_may_not_be_written_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, there: bool) -> None:
    if there:
        (tmp_path / "c.json").touch()
    monkeypatch.setattr(os, "access", lambda place, mode: Path(place) != tmp_path / "c.json" if there else False)
    with pytest.raises(ValueError, match="may not be written"):
        check_file(tmp_path / "c.json", "--json")
