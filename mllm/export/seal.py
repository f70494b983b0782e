"""Is this the export of that stage, and is it still what was proven?

Enters: a stage folder, an exported folder. Leaves: digests, which `export.json` keeps; or the proven `Exported` again,
if both folders are what they were then.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from mllm.export import REPORT, Exported
from mllm.export.proof import Proof


def stage_digest(folder: Path) -> str:
    """Of the config and every trained weight; checkpoints are no part of a finished stage."""
    weights = [path for path in folder.rglob("*.safetensors") if "checkpoints" not in path.relative_to(folder).parts]
    whole = hashlib.sha256()
    for path in sorted([folder / "config.yaml", *weights]):
        whole.update(f"{path.relative_to(folder)} {digest(path)}\n".encode())
    return whole.hexdigest()


def file_digests(folder: Path) -> dict[str, str]:
    """Of every file that was proven: all but the report itself and a card beside it."""
    found = sorted(path for path in folder.rglob("*") if path.is_file())
    names = {str(path.relative_to(folder)): path for path in found}
    return {name: digest(path) for name, path in names.items() if name not in (REPORT, "README.md")}


def digest(path: Path) -> str:
    found = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            found.update(block)
    return found.hexdigest()


def proven(folder: Path, stage: Path) -> Exported:
    """The export that lies in `folder`, with the proofs that it got when it was made.

    Raises:
        ValueError: there is none, it is another model's, or a file is not what it was.
    """
    if not (folder / REPORT).is_file():
        raise ValueError(f"{folder} holds no export: mllm export writes {REPORT} beside what it proved")
    told = json.loads((folder / REPORT).read_text())
    proofs = tuple(Proof(**{**proof, "faults": tuple(proof["faults"])}) for proof in told["proofs"])
    if failed := [proof for proof in proofs if proof.faults]:
        raise ValueError(f"{folder} was refused, it is not the model: {'; '.join(map(str, failed))}")
    if "stage" not in told:
        raise ValueError(f"{folder} was written by an older mllm export, which did not note of what: export again")
    if told["stage"] != stage_digest(stage):
        raise ValueError(f"{folder} is not an export of {stage} as it is now: export again")
    found = file_digests(folder)
    changed = sorted(name for name in told["files"].keys() | found.keys() if told["files"].get(name) != found.get(name))
    if changed:
        raise ValueError(f"{folder} is not what was proven, {', '.join(changed[:3])} changed since: export again")
    return Exported(folder, told["to"], told["architecture"], told["why"], proofs, tuple(told["notes"]))
