"""Exported folders of the matrix' cells, and what clean processes make of many of them at once.

Enters: a cell of `models/matrix.py`. Leaves: its stage, trained as if by chance, exported; and the proofs that one
fresh process without mllm gave for a list of such folders.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from conftest import LLM_CONFIGS, make_llm, make_tokenizer
from mllm.export.environments import Environment
from mllm.export.proof import SCRIPT, Proof, judge, write_reference
from mllm.export.remote_code.writer import ARCHITECTURE
from mllm.export.trained import load
from mllm.export.transformers_folder import write_files
from models.encoder_families import MODELS, save_encoder
from models.matrix import ATTENTION, Cell
from stages import make_stage

WINDOW = 20
"""Narrower than the questions."""
LOOSER = {"gemma2": {"final_logit_softcapping": 3.0}}
"""Random logits behind a cap of 0.05 are all but equal: which one is the largest would be rounding's choice."""
NEW_TOKENS = 4
"""The first from the prompt, the others from the cache."""
MANY = Path(__file__).with_name("many.py")


@dataclass(frozen=True)
class Written:
    cell: Cell
    architecture: str
    folder: Path
    reference: Path


def write_parts(folder: Path) -> Path:
    """Every encoder and every LLM in the Hub's format, with weights sharp enough that answers differ."""
    for number, (family, make) in enumerate(MODELS.items()):
        torch.manual_seed(number)
        save_encoder(sharpened(make(), 0.1), family, folder / family)
    for family, (_, own) in LLM_CONFIGS.items():
        window = {"sliding_window": WINDOW} if "sliding_window" in own else {}
        llm: Any = sharpened(make_llm(family, ATTENTION.get(family, "sdpa"), **window, **LOOSER.get(family, {})), 0.2)
        llm.save_pretrained(folder / family)
        make_tokenizer().save_pretrained(folder / family)
    return folder


@torch.no_grad()
def sharpened(model: torch.nn.Module, by: float) -> torch.nn.Module:
    """Many of these weights are born as zeros and ones."""
    for parameter in model.parameters():
        parameter += by * torch.randn_like(parameter)
    return model


def write_cell(cell: Cell, parts: Path, folder: Path) -> Written:
    """A stage of these parts, exported in float32."""
    stage = make_stage(
        folder,
        cell.connector_config(),
        vision_encoder=str(parts / cell.encoder),
        llm=str(parts / cell.llm),
        attention=ATTENTION.get(cell.llm, "sdpa"),
        **cell.tap(),
    )
    trained = load(str(stage))
    out = folder / str(cell).replace("-", "_")  # remote code is cached by this name
    home = write_files(trained, out, torch.float32)
    write_reference(trained, folder, torch.float32, NEW_TOKENS)
    shutil.rmtree(stage)
    return Written(cell, home.architecture or ARCHITECTURE, out, folder)


def prove_in_one_process(written: list[Written], environment: Environment, place: Path) -> Iterator[Proof]:
    """What a Python that cannot import mllm says of each folder; a class other than the exporter's is a fault too."""
    pairs = place / "pairs.json"
    pairs.write_text(json.dumps([(str(one.folder), str(one.reference)) for one in written]))
    command = [environment.python, "-I", str(MANY), str(SCRIPT), str(pairs), *environment.packages]
    quiet = {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(place / "modules"), "TRANSFORMERS_VERBOSITY": "error"}
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **quiet}, cwd=place)
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(found) == len(written), f"ended with {done.returncode} after {len(found)} folders: {done.stderr[-2000:]}"
    for one, answer in zip(written, found, strict=True):
        proof = judge(environment, answer)
        other = answer.get("class", one.architecture)
        yield (
            proof
            if other == one.architecture
            else Proof(
                proof.environment, proof.transformers, (*proof.faults, f"it is a {other}, not a {one.architecture}")
            )
        )


def faults(proofs: Iterable[Proof], written: list[Written]) -> dict[str, tuple[str, ...]]:
    """Of those cells that have any."""
    return {str(one.cell): proof.faults for one, proof in zip(written, proofs, strict=True) if proof.faults}
