"""The numbers of a run in TensorBoard, Weights & Biases or Trackio, through accelerate.

Enters: the names of the trackers and the numbers of each step. Leaves: the same fields as in `metrics.jsonl`, sections
parted by a slash. A resumed run goes on where the first one is drawn, and no step is drawn twice: TensorBoard is told
to forget what lies behind the checkpoint; to the others nothing is sent that was sent before. Only rank 0 logs.
"""

from __future__ import annotations

import importlib.util
import json
import uuid
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import yaml

from mllm.train.saving import durable

if TYPE_CHECKING:
    from accelerate import Accelerator

    from mllm.train.settings import TrackerName, TrainConfig

REMEMBERED = "trackers.json"
"""In the stage folder: by what id the services know the run."""


def check(names: list[TrackerName]) -> None:
    """Stop before anything is loaded where a tracker is missing.

    Raises:
        ValueError: says how to install it.
    """
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(
            f"train.trackers names {' and '.join(missing)}, not installed here: pip install {' '.join(missing)} "
            f"(or 'mllm[trackers]' for all of them), or leave it out"
        )


class Tracking:
    """A context: what is logged inside arrives at every tracker. Off the main process, and without trackers, it does
    nothing."""

    def __init__(self, accelerator: Accelerator, train: TrainConfig, first_step: int, sent: int) -> None:
        """`first_step` steps lie behind the checkpoint, `sent` were told before the run was cut off."""
        check(train.trackers)
        self.accelerator, self.train, self.first_step, self.sent = accelerator, train, first_step, sent
        self.is_on = bool(train.trackers) and accelerator.is_main_process

    def __enter__(self) -> Tracking:
        if self.is_on:
            folder = self.train.output_dir
            self.accelerator.log_with = list(self.train.trackers)  # type: ignore[assignment]
            self.accelerator.project_configuration.logging_dir = str(folder / "tensorboard")
            told = options(self.train, run_id(folder), self.first_step)
            self.accelerator.init_trackers(self.train.project, init_kwargs=told)
            for tracker in self.accelerator.trackers:
                describe(tracker, folder / "config.yaml")
        return self

    def log(self, step: int, numbers: dict[str, float]) -> None:
        """The numbers of one step."""
        for tracker in self.accelerator.trackers if self.is_on else []:
            if tracker.name == "tensorboard" or step > self.sent:
                # a curve of the steps over the steps; trackio keeps that name for itself, and warns
                own = {name: value for name, value in numbers.items() if tracker.name != "trackio" or name != "step"}
                tracker.log(own, step=step)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        while self.is_on and self.accelerator.trackers:
            tracker = self.accelerator.trackers.pop()
            if error and tracker.name == "wandb":
                tracker.tracker.finish(exit_code=1)  # shown as crashed
            else:
                tracker.finish()


def run_id(folder: Path) -> str:
    """What the services know this run by, until the folder is emptied: a run that goes on keeps it, also one that was
    cut off before its first checkpoint."""
    path = folder / REMEMBERED
    if not path.exists():
        durable.write_text(path, json.dumps({"id": uuid.uuid4().hex[:8]}) + "\n")
    return str(json.loads(path.read_text())["id"])


def options(train: TrainConfig, run: str, first_step: int) -> dict[str, dict[str, Any]]:
    """What each tracker is started with."""
    name = train.run_name or "/".join(train.output_dir.resolve().parts[-2:])
    return {
        "tensorboard": {"purge_step": first_step + 1},
        "wandb": {"name": name, "id": run, "resume": "allow", "dir": str(train.output_dir)},
        "trackio": {"name": f"{name}-{run}", "resume": "allow"},
    }


def describe(tracker: Any, config: Path) -> None:
    """The merged config beside the curves."""
    text = config.read_text() if config.exists() else ""
    if tracker.name == "tensorboard":
        tracker.tracker.add_text("config", f"```yaml\n{text}\n```")
    elif tracker.name == "trackio":
        tracker.run.config.update(yaml.safe_load(text) or {})  # accelerate's own way adds a key of wandb's to it
    else:
        tracker.store_init_configuration(yaml.safe_load(text) or {})
