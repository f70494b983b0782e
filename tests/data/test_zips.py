"""Files inside zips: the right bytes for every process and thread, and an error for everything else."""

from __future__ import annotations

import multiprocessing
import os
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from mllm.data.imaging import zips
from mllm.data.imaging.zips import read_member

MOST = 10**6


def content(number: int) -> bytes:
    return np.random.default_rng(number).integers(0, 8, 2000 + 37 * number, np.uint8).tobytes()


@pytest.fixture(params=[zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED], ids=["stored", "deflated"])
def archive(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    path = tmp_path / "images ü.zip"
    with zipfile.ZipFile(path, "w", request.param) as whole:
        for number in range(40):
            whole.writestr(f"folder/{number} ü.bin", content(number))
        whole.writestr("empty", b"")
    return path


def read(archive: Path, number: int) -> bytes:
    return read_member(f"{archive}::folder/{number} ü.bin", MOST)


def read_all(archive: Path) -> bool:
    return all(read(archive, number) == content(number) for _ in range(5) for number in range(40))


def test_members_are_read_in_any_order(archive: Path) -> None:
    assert all(read(archive, number) == content(number) for number in (39, 0, 17, 17, 3))
    assert read_member(f"{archive}::empty", MOST) == b""


def test_an_archive_may_stand_where_a_folder_does(archive: Path) -> None:
    folder = Path(f"{archive}::")
    assert read_member(str(folder / "folder/7 ü.bin"), MOST) == content(7)


def test_threads_share_an_archive(archive: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(read_all, [archive] * 16))


@pytest.mark.parametrize("method", ["fork", "spawn"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_processes_share_an_archive_that_was_open_before(archive: Path, method: str) -> None:
    assert read_all(archive)
    with multiprocessing.get_context(method).Pool(2) as pool:
        assert all(pool.map(read_all, [archive] * 6, chunksize=1))


def test_an_archive_is_opened_once(archive: Path) -> None:
    zips.read_archive.cache_clear()
    read_all(archive)
    assert zips.read_archive.cache_info().misses == 1


def test_an_archive_that_was_replaced_is_read_again(archive: Path) -> None:
    read(archive, 1)
    other = archive.with_suffix(".new")
    with zipfile.ZipFile(other, "w") as whole:
        whole.writestr("folder/1 ü.bin", b"new")
    os.replace(other, archive)
    assert read(archive, 1) == b"new"


def test_of_two_members_of_one_name_the_last_is_taken(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as whole:
        whole.writestr("a", b"first")
        with pytest.warns(UserWarning, match="Duplicate"):
            whole.writestr("a", b"last")
    assert read_member(f"{tmp_path}/a.zip::a", MOST) == b"last"


@pytest.mark.parametrize(
    ("name", "said"),
    [("images ü.zip::folder/99", "no 'folder/99' among the 41 files"), ("gone.zip::a", "no such archive: .*gone.zip")],
)
def test_what_is_not_there_is_named(archive: Path, name: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        read_member(f"{archive.parent}/{name}", MOST)


def test_a_member_larger_than_the_limit_is_not_unpacked(archive: Path) -> None:
    with pytest.raises(ValueError, match="2037 bytes, more than 2036"):
        read_member(f"{archive}::folder/1 ü.bin", 2036)


def test_a_damaged_member_is_an_error_and_its_neighbours_are_whole(archive: Path) -> None:
    with zipfile.ZipFile(archive) as whole:
        start = whole.getinfo("folder/5 ü.bin").header_offset + 300
    damaged = bytearray(archive.read_bytes())
    damaged[start : start + 9] = b"\xff" * 9
    archive.write_bytes(damaged)
    with pytest.raises(ValueError, match="damaged in its archive"):
        read(archive, 5)
    assert read(archive, 4) == content(4)


def test_an_unusual_packing_is_refused_with_a_remedy(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_BZIP2) as whole:
        whole.writestr("a", b"x" * 100)
    with pytest.raises(ValueError, match="pack the archive again"):
        read_member(f"{tmp_path}/a.zip::a", MOST)
