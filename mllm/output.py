"""The output folder of a stage: whose it is, and what may happen to what lies there.

Enters: a `RunConfig`. Leaves: a folder that is free for this run, or is this run's own and goes on; a used one is
refused unless the user said what to do with it.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

from mllm.config import RunConfig, load_config
from mllm.resuming import check_changes
from mllm.train.audit import FILE as AUDIT_FILE
from mllm.train.blip2.text_side import FILE as TEXT_SIDE
from mllm.train.checkpoint import checkpoints
from mllm.train.saving import durable
from mllm.train.stage_folder import FINISHED
from mllm.train.tuning.fp8_gate import FILE as FP8_FILE
from mllm.train.watching import trackers
from mllm.writable import check_file, check_folder

WRITTEN = (
    FINISHED,
    "config.yaml",
    "image_newline.safetensors",
    "llm.safetensors",
    TEXT_SIDE,
    "vision_encoder.safetensors",
    "adapter",
    "vision_adapter",
    "processor",
    "checkpoints",
    "metrics.jsonl",
    "loss.png",
    "tensorboard",
    "wandb",
    trackers.REMEMBERED,
    "quarantine.jsonl",
    "guard.jsonl",
    "hang.jsonl",
    "ledger.json",
    FP8_FILE,
    AUDIT_FILE,
)
"""All that a stage writes: what --overwrite removes, and nothing else."""


def check_output(config: RunConfig) -> None:
    """Refuse a folder that holds a run, unless told what to do with it."""
    folder = config.train.output_dir
    if folder.is_file():
        raise ValueError(f"train.output_dir {folder} is a file: name a folder")
    if config.init_from and folder.resolve() == config.init_from.resolve():
        raise ValueError(
            f"init_from and train.output_dir are both {folder}: a stage cannot replace the one it starts from"
        )
    if config.resume and config.overwrite:
        raise ValueError("--resume keeps the output folder and --overwrite empties it: give one of them")
    used = [name for name in WRITTEN if (folder / name).exists()]
    if used and not (config.resume or config.overwrite or config.dry_run):
        raise ValueError(
            f"{folder} holds a run already ({', '.join(used[:3])}): "
            f"--resume goes on with it, --overwrite starts again, --train.output_dir names another place"
        )
    if config.json:
        check_file(config.json, "--json")
    if not config.dry_run:
        check_folder(folder, "train.output_dir")
    if config.resume and (folder / FINISHED).exists() and not config.dry_run:
        leave_if_finished(config)
    if config.resume and (changed := check_changes(config)) and os.environ.get("RANK", "0") == "0":
        print(f"resume: from here on with other settings: {'; '.join(changed)}")


def leave_if_finished(config: RunConfig) -> None:
    """A finished run is left as it is, and that is no error: a job that is started again and again ends so. One that
    shall be longer than it was goes on from its newest checkpoint."""
    folder = config.train.output_dir
    was = load_config(folder / "config.yaml").train
    if (was.steps, was.epochs) == (config.train.steps, config.train.epochs):
        if os.environ.get("RANK", "0") == "0":
            print(f"resume: {folder} is finished already, nothing is changed (--overwrite starts again)")
        sys.exit(0)
    if not checkpoints(folder):
        raise ValueError(
            f"nothing to resume: {folder} is finished, and {folder / 'checkpoints'} holds no checkpoint from which it "
            f"could be made longer (train.save_every writes them): --overwrite starts again"
        )


def remove(folder: Path) -> None:
    """Take away what stages write, and nothing else. The checkpoints go in one act, and before what tells of them: what
    is left of a removal that was cut off cannot be resumed."""
    if (folder / "checkpoints").exists():
        durable.remove(folder / "checkpoints")
    for name in WRITTEN:
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
