"""A trained model in the forms that others load. This room decides, and calls nothing exported that is not proven.

Enters: a stage folder, what it is to become, an output folder. Leaves: the folder, and in it `export.json`: which
class holds the model, and every version of transformers that loaded it in a fresh process without mllm and said the
same. A folder that fails is left beside its place as `NAME.refused`, and the command ends in an error.

- `transformers`: a stock class where one holds the model exactly (`homes.py`), else remote code
- `merged`: our own stage folder with the LoRA in the LLM's weights
- `adapter`: the LoRA alone, beside the model that it belongs to
- `gguf`: the LLM and the encoder for llama.cpp
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

To = Literal["transformers", "merged", "adapter", "gguf"]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
REPORT = "export.json"


@dataclass(frozen=True)
class Exported:
    """What was written, and who read it back."""

    folder: Path
    to: str
    architecture: str
    why: str
    proofs: tuple[Any, ...] = ()
    notes: tuple[str, ...] = ()

    def lines(self) -> list[str]:
        """What the command prints."""
        told = [f"{self.folder}: {self.architecture} ({self.why})", *(f"proven: {proof}" for proof in self.proofs)]
        return told + [f"note: {note}" for note in self.notes]


def export(
    model: str,
    out: Path,
    to: To = "transformers",
    dtype: Dtype = "auto",
    check_with: list[str] | None = None,
    overwrite: bool = False,
) -> Exported:
    """Write `model` to `out` in the form `to`, and prove it.

    Raises:
        ValueError: no such model, a used output folder, or a proof that failed (it says which, and by how much).
    """
    check_out(out, overwrite)
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        exported = FORMS[to](model, partial, dtype, check_with or [])
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return finish(exported, out, model)


def finish(exported: Exported, out: Path, model: str) -> Exported:
    """Give the folder its name if every proof held."""
    from mllm.export.seal import file_digests, stage_digest
    from mllm.generate import find_folder

    partial = exported.folder
    seal = {"stage": stage_digest(find_folder(model)), "files": file_digests(partial)}
    report = {**asdict(exported), "folder": out.name, **seal}
    (partial / REPORT).write_text(json.dumps(report, indent=2) + "\n")
    failed = [proof for proof in exported.proofs if proof.faults]
    place = out.with_name(out.name + ".refused") if failed else out
    if place.exists():
        shutil.rmtree(place)
    partial.rename(place)
    if failed:
        raise ValueError(
            f"not exported: {'; '.join(map(str, failed))}. What was written lies in {place} and is not the model"
        )
    return Exported(out, exported.to, exported.architecture, exported.why, exported.proofs, exported.notes)


def check_out(out: Path, overwrite: bool) -> None:
    """Refuse a folder that holds something, unless told to replace it."""
    if out.is_file():
        raise ValueError(f"--out {out} is a file: name a folder")
    if not out.exists() or not any(out.iterdir()):
        return
    if not overwrite:
        raise ValueError(f"--out {out} is not empty: --overwrite replaces it, or name another folder")
    if not (out / REPORT).is_file():
        raise ValueError(
            f"--out {out} is not empty and was not written by mllm export (no {REPORT}): empty it yourself"
        )


def to_transformers(model: str, folder: Path, dtype: Dtype, check_with: list[str]) -> Exported:
    from mllm.export.transformers_folder import write

    return write(model, folder, dtype, check_with)


def to_gguf(model: str, folder: Path, dtype: Dtype, check_with: list[str]) -> Exported:
    from mllm.export.gguf import write

    return write(model, folder, dtype, check_with)


def to_merged(model: str, folder: Path, dtype: Dtype, check_with: list[str]) -> Exported:
    from mllm.export.merged import write

    return write(model, folder, dtype, check_with)


def to_adapter(model: str, folder: Path, dtype: Dtype, check_with: list[str]) -> Exported:
    from mllm.export.adapter import write

    return write(model, folder, dtype, check_with)


FORMS = {"transformers": to_transformers, "merged": to_merged, "adapter": to_adapter, "gguf": to_gguf}
