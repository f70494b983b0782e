"""Results of an earlier call that this one may go on with.

Enters: a file that a benchmark wrote, this machine. Leaves: what the file holds, if it is of the same machine, the same
libraries, the same code, and not old; rows for which there was no time, and such as failed, are measured again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from datetime import date
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
SAME = ("gpu", "cuda", "processor", "python", "torch", "triton", "transformers", "accelerate", "peft")
"""What must be equal for figures to stand in one table."""
DAYS = 1
"""A file may be so old."""


def fingerprint(root: Path = ROOT) -> str:
    """Of the code that is measured, and of the code that measures."""
    whole = hashlib.sha256()
    for path in sorted([*(root / "mllm").rglob("*.py"), *(root / "recipes").rglob("*.py")]):
        whole.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes() + b"\0")
    return whole.hexdigest()[:16]


def earlier(path: Path, machine: Mapping[str, Any]) -> dict[str, Any] | None:
    """What the file holds; nothing where there is none.

    Raises:
        ValueError: its figures and new ones do not belong into one table.
    """
    if not path.is_file():
        return None
    found: dict[str, Any] = json.loads(path.read_text())
    if why := stranger(found, machine):
        raise ValueError(f"{path} cannot be gone on with: {why}. Give another folder, or delete the file")
    return found


def stranger(found: Mapping[str, Any], machine: Mapping[str, Any]) -> str:
    """Why it does not belong here; empty where it does."""
    then = found["machine"]
    for name in SAME:
        if then.get(name) != machine.get(name):
            return f"it was measured with {name} {then.get(name)}, here is {machine.get(name)}"
    if found.get("code") != fingerprint():
        return "the code in mllm/ and recipes/ has changed since"
    if (days := (date.fromisoformat(machine["date"]) - date.fromisoformat(then["date"])).days) > DAYS:
        return f"it is {days} days old"
    return ""


def with_figures(rows: Mapping[str, Any]) -> dict[str, Any]:
    """The configurations that need not be measured again."""
    return {name: row for name, row in rows.items() if "tokens_per_second" in row}
