"""Files and folders that are whole or not there, whatever moment the machine stops at.

Enters: text for a file, or a folder that was written beside its place. Leaves: the same under its name, on the disk and
not only in the kernel's memory; a folder has a manifest, by which `damage` tells later what is wrong with it.

A rename is atomic, but only what was synced before it survives a power cut, and the rename itself lies in the folder
above: so files are synced, then their folder, then the rename, then the folder above it.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"
UNFINISHED, REPLACED = ".partial-", ".replaced-"
"""How a name starts while it is being written, and while another one takes its place."""
CHUNK = 1 << 22


def write_text(path: Path, text: str) -> None:
    """Replace a file in one act."""
    beside = path.with_name(UNFINISHED + path.name)
    beside.write_text(text)
    sync(beside)
    os.replace(beside, path)
    sync(path.parent)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON-lines file up to the first line that is not whole: a process that was killed may leave half
    a one."""
    found: list[dict[str, Any]] = []
    for line in path.read_bytes().splitlines(keepends=True) if path.exists() else ():
        try:
            if not line.endswith(b"\n"):
                break
            found.append(json.loads(line))
        except ValueError:
            break
    return found


def write_lines(path: Path, lines: list[dict[str, Any]]) -> None:
    """Replace a JSON-lines file in one act."""
    write_text(path, "".join(json.dumps(line) + "\n" for line in lines))


def keep_before(path: Path, step: int) -> list[dict[str, Any]]:
    """The lines of earlier steps, after cutting the file there: a resumed run writes the later ones anew."""
    kept = [line for line in read_lines(path) if line["step"] <= step]
    if path.exists():
        write_lines(path, kept)
    return kept


def put_in_place(beside: Path, place: Path) -> None:
    """Seal a folder that is written, and let it take its place. A folder of that name steps aside first, and goes when
    the new one stands: at every moment one of the two is whole under a name that `candidates` knows."""
    seal(beside)
    aside = place.with_name(REPLACED + place.name)
    if place.exists():
        shutil.rmtree(aside, ignore_errors=True)
        os.rename(place, aside)
    os.rename(beside, place)
    sync(place.parent)
    shutil.rmtree(aside, ignore_errors=True)


def remove(folder: Path) -> None:
    """Take a folder away; one whose removal was cut off is no longer found under its name."""
    beside = folder.with_name(UNFINISHED + folder.name)
    shutil.rmtree(beside, ignore_errors=True)
    os.rename(folder, beside)
    shutil.rmtree(beside)


def heal(folder: Path) -> None:
    """Finish what a process that was killed left undone: half-written folders go, one that had stepped aside comes back
    if nothing took its place."""
    for beside in folder.glob(UNFINISHED + "*"):
        shutil.rmtree(beside) if beside.is_dir() else beside.unlink()
    for aside in folder.glob(REPLACED + "*"):
        place = aside.with_name(aside.name.removeprefix(REPLACED))
        shutil.rmtree(aside) if place.exists() else os.rename(aside, place)


def candidates(folder: Path, pattern: str) -> list[Path]:
    """Folders whose name fits, and those that had stepped aside for one that never came."""
    aside = [path for path in folder.glob(REPLACED + pattern) if not path.with_name(own_name(path)).exists()]
    return [*folder.glob(pattern), *aside]


def own_name(path: Path) -> str:
    """The name that a folder has when nobody is replacing it."""
    return path.name.removeprefix(REPLACED)


def seal(folder: Path) -> None:
    """Write the manifest, and let everything in the folder reach the disk."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    listed = {str(path.relative_to(folder)): {"bytes": path.stat().st_size, "sha256": digest(path)} for path in files}
    (folder / MANIFEST).write_text(json.dumps({"files": listed}, indent=1) + "\n")
    for path in [*files, folder / MANIFEST, *(path for path in folder.rglob("*") if path.is_dir()), folder]:
        sync(path)


def damage(folder: Path) -> str:
    """What is wrong with a sealed folder, in words; nothing where each file is, byte for byte, what was written."""
    if not (folder / MANIFEST).is_file():
        return f"it has no {MANIFEST}: half-written, or older than manifests"
    try:
        listed = json.loads((folder / MANIFEST).read_text())["files"]
        wrong = [damage_of_file(folder / name, told["bytes"], told["sha256"]) for name, told in listed.items()]
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        return f"{MANIFEST} cannot be read ({error!r})"
    return "; ".join(filter(None, wrong))


def damage_of_file(path: Path, size: int, sha256: str) -> str:
    """The same for one file; the bytes are read only where the size is right."""
    if not path.is_file():
        return f"{path.name} is missing"
    if (found := path.stat().st_size) != size:
        return f"{path.name} has {found:,} bytes, {size:,} were written"
    try:
        return "" if digest(path) == sha256 else f"{path.name} has other bytes than were written"
    except OSError as error:
        return f"{path.name} cannot be read ({error})"


def digest(path: Path) -> str:
    """SHA-256 of a file."""
    sha256 = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            sha256.update(chunk)
    return sha256.hexdigest()


def sync(path: Path) -> None:
    """Let a file, or the names in a folder, reach the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
