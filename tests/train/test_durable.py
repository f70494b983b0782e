"""A folder is whole or not there: whatever act of writing is the last one, and whatever byte is spoilt later."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mllm.train.saving import durable
from mllm.train.saving.durable import MANIFEST, candidates, damage, heal, put_in_place, read_lines, remove, write_text


def written(folder: Path, words: str = "new") -> Path:
    """A folder of two files, one in a folder of its own, that is not sealed yet."""
    (folder / "inner").mkdir(parents=True)
    (folder / "weights").write_text(words * 50)
    (folder / "inner" / "state").write_text(words)
    return folder


@pytest.fixture
def sealed(tmp_path: Path) -> Path:
    put_in_place(written(tmp_path / ".partial-step-1"), tmp_path / "step-1")
    return tmp_path / "step-1"


class Killed(BaseException):
    """The process ends here."""


def die_at(monkeypatch: pytest.MonkeyPatch, act: int) -> None:
    """The `act`-th thing that is done to the disk from now on is not done, nor any after it."""
    acts = 0

    def counted(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            nonlocal acts
            acts += 1
            if acts >= act:
                raise Killed
            return real(*arguments, **options)

        return call

    for module, name in ((os, "rename"), (os, "replace"), (os, "fsync"), (os, "unlink"), (os, "rmdir")):
        monkeypatch.setattr(module, name, counted(getattr(module, name)))
    monkeypatch.setattr(Path, "write_text", counted(Path.write_text))
    monkeypatch.setattr(shutil, "rmtree", counted(shutil.rmtree))


def survivors(folder: Path) -> list[str]:
    """What whole folders say of themselves."""
    return [(path / "inner" / "state").read_text() for path in candidates(folder, "step-*") if not damage(path)]


def test_whatever_act_is_the_last_the_old_or_the_new_folder_is_whole(tmp_path: Path) -> None:
    seen = set()
    for act in range(1, 100):
        folder = tmp_path / str(act)
        put_in_place(written(folder / ".partial-step-1", "old"), folder / "step-1")
        new = written(folder / ".partial-step-1")
        try:
            with pytest.MonkeyPatch.context() as patched:
                die_at(patched, act)
                put_in_place(new, folder / "step-1")
            break
        except Killed:
            pass
        (found,) = survivors(folder)
        seen.add(found)
        heal(folder)
        assert survivors(folder) == [found]
        assert [path.name for path in folder.iterdir()] == ["step-1"]
    assert act > 10
    assert seen == {"old", "new"}
    assert survivors(folder) == ["new"]


def test_whatever_act_is_the_last_a_removal_leaves_nothing_that_passes_for_whole(tmp_path: Path) -> None:
    for act in (1, 2):
        folder = tmp_path / str(act)
        put_in_place(written(folder / ".partial-step-1"), folder / "step-1")
        with pytest.MonkeyPatch.context() as patched:
            die_at(patched, act + 1)  # its first act clears the place for the rename
            with pytest.raises(Killed):
                remove(folder / "step-1")
        assert len(survivors(folder)) == (act == 1)
        heal(folder)
        assert len(list(folder.iterdir())) == (act == 1)


def test_whatever_act_is_the_last_a_file_has_its_old_or_its_new_text(tmp_path: Path) -> None:
    seen = set()
    for act in range(1, 20):
        path = tmp_path / "file"
        path.write_text("old")
        try:
            with pytest.MonkeyPatch.context() as patched:
                die_at(patched, act)
                write_text(path, "new")
            break
        except Killed:
            seen.add(path.read_text())
    assert seen == {"old", "new"}  # new: only the last act, the folder's sync, was missing
    assert path.read_text() == "new"


def test_every_file_and_every_folder_is_synced_before_the_rename(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    acts: list[str] = []
    sync, rename = durable.sync, os.rename
    monkeypatch.setattr(durable, "sync", lambda path: (acts.append(path.name), sync(path)))
    monkeypatch.setattr(os, "rename", lambda *paths: (acts.append("rename"), rename(*paths)))
    put_in_place(written(tmp_path / "beside"), tmp_path / "place")
    before, after = acts[: acts.index("rename")], acts[acts.index("rename") + 1 :]
    assert sorted(before) == ["beside", "inner", MANIFEST, "state", "weights"]
    assert after == [tmp_path.name]


def test_whole_folder_has_no_damage(sealed: Path) -> None:
    assert damage(sealed) == ""
    listed = json.loads((sealed / MANIFEST).read_text())["files"]
    assert {name: file["bytes"] for name, file in listed.items()} == {"weights": 150, "inner/state": 3}


def test_any_bit_of_any_file_that_flips_is_found_and_its_file_named(sealed: Path) -> None:
    draw = random.Random(0)
    for name in ("weights", "inner/state"):
        path, whole = sealed / name, (sealed / name).read_bytes()
        for bit in draw.sample(range(8 * len(whole)), 10):
            spoilt = bytearray(whole)
            spoilt[bit // 8] ^= 1 << bit % 8
            path.write_bytes(bytes(spoilt))
            assert damage(sealed) == f"{path.name} has other bytes than were written"
        path.write_bytes(whole)
    assert damage(sealed) == ""


def test_manifest_that_lost_a_bit_never_makes_a_spoilt_folder_whole(sealed: Path) -> None:
    path, whole = sealed / MANIFEST, (sealed / MANIFEST).read_bytes()
    (sealed / "weights").write_text("spoilt" * 25)
    for bit in range(8 * len(whole)):
        spoilt = bytearray(whole)
        spoilt[bit // 8] ^= 1 << bit % 8
        path.write_bytes(bytes(spoilt))
        assert damage(sealed)


def cut(folder: Path) -> None:
    os.truncate(folder / "weights", 149)


SPOILT: dict[str, tuple[Callable[[Path], object], str]] = {
    "cut short": (cut, "weights has 149 bytes, 150 were written"),
    "a file is gone": (lambda folder: (folder / "inner" / "state").unlink(), "state is missing"),
    "no manifest": (lambda folder: (folder / MANIFEST).unlink(), "no manifest.json: half-written"),
    "half a manifest": (lambda folder: os.truncate(folder / MANIFEST, 40), "manifest.json cannot be read"),
    "a manifest of something else": (
        lambda folder: (folder / MANIFEST).write_text("[]"),
        "manifest.json cannot be read",
    ),
    "nothing in it": (lambda folder: [shutil.rmtree(folder), folder.mkdir()], "no manifest.json"),
    "two files": (lambda folder: [cut(folder), shutil.rmtree(folder / "inner")], "state is missing; weights has 149"),
}


@pytest.mark.parametrize("how", SPOILT)
def test_what_is_wrong_is_said(sealed: Path, how: str) -> None:
    spoil, said = SPOILT[how]
    spoil(sealed)
    assert said in damage(sealed)


def test_lines_end_where_a_killed_process_stopped_writing(tmp_path: Path) -> None:
    line = b'{"a": {"b": 1}}\n'
    path = tmp_path / "lines.jsonl"
    assert read_lines(path) == []
    for size in range(len(line)):  # one byte short of the whole line as well, which ends like one
        path.write_bytes(line * 2 + line[:size])
        assert read_lines(path) == [{"a": {"b": 1}}] * 2
    path.write_bytes(line * 3)
    assert len(read_lines(path)) == 3
    path.write_bytes(line + b"\0" * 20 + b"\n" + line)  # what a power cut may leave
    assert len(read_lines(path)) == 1
