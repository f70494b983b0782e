"""Where an exported folder is loaded again: this Python, another one, or this one with another transformers.

Enters: what the user named (`4.57.6`, `/path/to/python`) or nothing. Leaves: `Environment`s. Another transformers is
installed by pip into a folder of its own in the cache, once, beside nothing of ours: 60 MB, torch is shared.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from mllm.data.copies import cache_folder

OLD = "4.57.6"
"""The last release before transformers 5; what published checkpoints and many servers still read with."""


@dataclass(frozen=True)
class Environment:
    """A Python, and a folder of packages that come first on its path."""

    name: str
    python: str
    packages: tuple[str, ...] = ()


HERE = Environment("this environment", sys.executable)


def choose(named: list[str]) -> tuple[list[Environment], str]:
    """This Python always; then what was named, or the old transformers if it can be had. With a sentence about what
    was left out.

    Raises:
        ValueError: what was named is neither a Python nor a version that pip can install.
    """
    if named == ["here"]:
        return [HERE], "checked under the installed transformers alone (--check-with here)"
    if named:
        return [HERE, *(parse(name) for name in named)], ""
    if not installed(OLD) and offline():
        return [HERE], f"not checked under transformers {OLD} (offline): --check-with {OLD} installs it once"
    try:
        return [HERE, parse(OLD)], ""
    except ValueError as error:
        return [HERE], f"not checked under transformers {OLD}: {error}"


def parse(name: str) -> Environment:
    """A version of transformers, or the path of a Python that has one."""
    if re.fullmatch(r"\d+(\.\d+)+", name):
        return Environment(f"transformers {name}", sys.executable, (str(install(name)),))
    if not os.access(name, os.X_OK):
        raise ValueError(f"--check-with {name}: expected a version of transformers ({OLD}) or the path of a Python")
    return Environment(name, name)


def place(version: str) -> Path:
    return cache_folder() / "environments" / f"transformers-{version}"


def installed(version: str) -> bool:
    return (place(version) / "finished").is_file()


def install(version: str) -> Path:
    """transformers of that version and what it depends on, except torch, in a folder of its own."""
    folder = place(version)
    if not installed(version):
        print(f"installing transformers {version} into {folder}, once", file=sys.stderr)
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--target", str(folder), "--upgrade"]
        done = subprocess.run([*command, f"transformers=={version}"], capture_output=True, text=True)
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["pip failed"])[-1]
            raise ValueError(f"pip cannot install transformers {version}: {last}")
        (folder / "finished").touch()
    return folder


def offline() -> bool:
    return os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on")
