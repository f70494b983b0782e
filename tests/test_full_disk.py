"""A disk that is full ends a run with one line, whoever wrote; any other error keeps its traceback."""

from __future__ import annotations

import resource
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from mllm.stage import user_errors

TAKEN = 64
"""Bytes that a file may have: the limit of a process stands for a disk that is full."""


def text(path: Path) -> None:
    path.write_text("a line" * 100)


def torch_file(path: Path) -> None:
    torch.save({"moments": torch.zeros(1000)}, path)


def tensors(path: Path) -> None:
    save_file({"weight": torch.zeros(1000)}, path)


def picture_on_the_way_out(path: Path) -> None:
    try:
        torch_file(path)
    finally:
        Image.effect_noise((64, 64), 50).save(path.with_suffix(".png"))


@pytest.fixture
def full(tmp_path: Path) -> Iterator[Path]:
    """A file that cannot be written whole."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (TAKEN, limits[1]))
    yield tmp_path / "file"
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("write", [text, torch_file, tensors, picture_on_the_way_out])
def test_full_disk_is_one_line_and_exit_code_2(write: Callable[[Path], None], full: Path, capsys: Any) -> None:
    with pytest.raises(SystemExit) as ended, user_errors():
        write(full)
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("error: the disk takes no more: ")
    assert "--resume" in said
    assert said.count("\n") == 1


@pytest.mark.parametrize("error", [FileNotFoundError(2, "No such file"), RuntimeError("shapes differ"), KeyError("x")])
def test_other_errors_keep_their_traceback(error: Exception) -> None:
    with pytest.raises(type(error)), user_errors():
        raise error
