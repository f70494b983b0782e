"""The real scripts of `recipes/`, by a launcher or in this process, on a small YAML."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from conftest import forget_accelerate

ROOT = Path(__file__).parent.parent
LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1", "--cpu"]


def write_config(folder: Path, hub: Path, data: Path, stage: str, **train: Any) -> Path:
    """The YAML of one small stage, beside its output."""
    config: dict[str, Any] = {
        "data": {"sources": [{"format": "llava", "path": str(data)}], "seq_length": 96, "num_workers": 0},
        "train": {
            "output_dir": str(folder / stage),
            "learning_rate": {"connector": 1e-2},
            "steps": 3,
            "rows_per_step": 2,
            "audit": "quick",
            **train,
        },
    }
    if stage == "align":
        config["model"] = {"vision_encoder": str(hub / "encoder"), "llm": str(hub / "llm")}
    else:
        config["init_from"] = str(folder / "align")
    (folder / f"{stage}.yaml").write_text(yaml.safe_dump(config))
    return folder / f"{stage}.yaml"


def launch(script: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [*LAUNCH, f"recipes/{script}.py", *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200", "ACCELERATE_USE_CPU": "true"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)


def in_process(script: str, *arguments: object) -> int:
    """The same script in this process: what it exits with."""
    forget_accelerate()
    before = sys.argv
    sys.argv = [script, *map(str, arguments)]
    try:
        runpy.run_path(str(ROOT / "recipes" / f"{script}.py"), run_name="__main__")
        return 0
    except SystemExit as ended:
        if isinstance(ended.code, int):
            return ended.code
        print(ended.code, file=sys.stderr)  # as the interpreter would
        return 1
    finally:
        sys.argv = before
        forget_accelerate()


def lines(stage: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (stage / "metrics.jsonl").read_text().splitlines()]
