"""Where the developers' shared data lies: outside the project, so a test that wants it skips without it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

SHARED = Path(os.environ.get("MLLM_SHARED_DATA", Path(__file__).parents[3] / "shared" / "data"))


def shared(name: str) -> Path:
    """The folder of that name, or a skip that says how to provide it."""
    folder = SHARED / name
    if not folder.is_dir():
        pytest.skip(f"no {folder}: set MLLM_SHARED_DATA to the folder that holds {name}")
    return folder
