"""Places that will be written after long work, looked at before it: what could not be written then is refused now.

Enters: the path of a file or a folder that may not be there yet. Leaves: nothing, or a `ValueError` that says what
stands in the way; nothing is made. Why: a run or an evaluation of hours must not end in "permission denied".
"""

from __future__ import annotations

import os
from pathlib import Path


def check_file(path: Path, option: str) -> None:
    """The file that `option` names can be written."""
    if path.is_dir():
        raise ValueError(f"{option} {path} is a folder: name a file")
    check_folder(path.parent, option)
    if path.exists() and not os.access(path, os.W_OK):
        raise ValueError(f"{option} {path} may not be written: name another file")


def check_folder(folder: Path, option: str) -> None:
    """The folder that `option` names, or in which its file lies, can be made and written in."""
    there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    if not there.is_dir():
        raise ValueError(f"{option}: {there} is a file, and {folder} cannot be a folder: name another place")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ValueError(f"{option}: {there} may not be written in: name another place")
