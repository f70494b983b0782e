"""Every connector and every LLM behind the encoders that learned from pictures alone: each cell computes, packs,
trains and is read back. The other encoders are in `test_matrix_image_text.py`, so that two processes share the work."""

from __future__ import annotations

from pathlib import Path

import pytest

from models.cells import check
from models.matrix import IMAGE_TEXT, PLAIN, Cell


@pytest.mark.parametrize("cell", [cell for cell in PLAIN if cell.encoder not in IMAGE_TEXT], ids=str)
def test_cell_computes_packs_trains_and_is_read_back(cell: Cell, tmp_path: Path) -> None:
    check(cell, tmp_path)
