"""The runs of `tests/test_gpu.py` under each engine, on a CPU: what a device must not be the first to find."""

from __future__ import annotations

from pathlib import Path

import pytest

from conftest import write_llava
from test_gpu import PRECISION, WHAT, losses

pytestmark = [pytest.mark.long, pytest.mark.recipe]


@pytest.fixture(scope="module")
def runs(hub: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rehearsal")
    (folder / "hub").symlink_to(hub)
    write_llava(folder, 12)
    return folder


@pytest.mark.parametrize("precision", PRECISION)
@pytest.mark.parametrize("what", WHAT)
@pytest.mark.parametrize("engine", ["zero2", "zero3", "fsdp2"])
def test_engine_on_one_process_has_the_losses_of_a_plain_run(
    runs: Path, engine: str, what: str, precision: str
) -> None:
    expected = losses(runs, "plain", what, precision, 1, "cpu")
    assert losses(runs, engine, what, precision, 1, "cpu") == pytest.approx(expected, rel=PRECISION[precision][2])
