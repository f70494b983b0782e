"""Two ranks of a real recipe under a real launcher, one of which goes wrong (`launched.py`)."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import yaml

from conftest import write_llava

ROOT = Path(__file__).parents[2]
LAUNCHER = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


def launch_with(
    case: str, culprit: int, hub: Path, folder: Path, **train: Any
) -> tuple[subprocess.CompletedProcess[str], float]:
    """What the launcher said, and the seconds it took."""
    config = {
        "model": {"vision_encoder": str(hub / "encoder"), "llm": str(hub / "llm")},
        "data": {
            "sources": [{"format": "llava", "path": str(write_llava(folder, 24))}],
            "seq_length": 96,
            "num_workers": 0,
        },
        "train": {
            "output_dir": str(folder / "align"),
            "learning_rate": {"connector": 1e-2},
            "steps": 12,
            "rows_per_step": 2,
            **train,
        },
    }
    (folder / "align.yaml").write_text(yaml.safe_dump(config))
    script = [
        "tests/train/launched.py",
        case,
        str(culprit),
        "recipes/pretrain.py",
        "--config",
        str(folder / "align.yaml"),
    ]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "COLUMNS": "200",
        "ACCELERATE_USE_CPU": "true",
        "NOTE": str(folder / "stopped"),
        "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}",
    }
    began = time.monotonic()
    done = subprocess.run([*LAUNCHER, *script], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=400)
    return done, time.monotonic() - began
