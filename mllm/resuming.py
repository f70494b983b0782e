"""What may be changed when a run goes on, and what may not.

Enters: the config of a run that is to go on, and the `config.yaml` that lies in its folder. Leaves: an error where
another model, or other pixels, would meet weights and moments that were learned with the first ones; and in words what
else is learned otherwise from here on. Rows, seed and data are the plan's to check (`train/checkpoint.py`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from mllm.config import RunConfig, dump_config
from mllm.train.checkpoint import checkpoints, newest, step_of

FIXED = (
    "model",
    "init_from",
    "init_parts",
    "data.image_fit",
    "data.tiles",
    "data.max_tiles",
    "data.image_markers",
    "data.video_frames",
    "train.lora",
    "train.vision_lora",
    "train.optimizer",
)
"""With another one of these, what was learned so far is that of another model."""
FREE = ("model.attention",)
"""Another way to the same numbers."""
PLACES = ("model.vision_encoder", "model.llm", "init_from")
"""Folders may have moved."""
TOLD = (
    "train.learning_rate",
    "train.epochs",
    "train.steps",
    "train.loss_reduction",
    "train.warmup",
    "train.schedule",
    "train.weight_decay",
    "train.max_grad_norm",
    "train.mixed_precision",
    "train.fp8",
    "train.guard",
    "data.jpeg_draft",
)
"""These change what is learned from here on, which a user may want."""
RATES = ("train.learning_rate.connector", "train.learning_rate.llm", "train.learning_rate.vision_encoder")


@dataclass(frozen=True)
class Change:
    """A setting that is another one now."""

    name: str
    before: Any
    now: Any

    def __str__(self) -> str:
        return f"{self.name} was {shown(self.before)}, is {shown(self.now)}"

    @property
    def is_refused(self) -> bool:
        if self.name in RATES:  # a part would begin or cease to train
            return bool(self.before) != bool(self.now)
        return below(self.name, FIXED) and not below(self.name, FREE) and not self.is_move

    @property
    def is_told(self) -> bool:
        return below(self.name, TOLD) or self.is_move

    @property
    def is_move(self) -> bool:
        """Does a folder lie elsewhere, and no longer where it lay? What `owner/name` holds is on the Hub."""
        if self.name not in PLACES or not all(isinstance(place, str) for place in (self.before, self.now)):
            return False
        before, now = Path(self.before).expanduser(), Path(self.now).expanduser()
        same = before.exists() and now.exists() and before.samefile(now)
        return same or (len(before.parts) > 2 and not before.exists() and now.exists())


def check_changes(config: RunConfig) -> list[str]:
    """What is learned otherwise than when the run was last started; nothing where it has no checkpoint yet.

    Raises:
        ValueError: a setting changed with which the checkpoints mean nothing.
    """
    folder = config.train.output_dir
    if not checkpoints(folder) or not (folder / "config.yaml").exists():
        return []
    before, now = (yaml.safe_load(text) for text in ((folder / "config.yaml").read_text(), dump_config(config)))
    found = list(changes(before, now))
    if refused := [str(change) for change in found if change.is_refused]:
        raise ValueError(
            f"the checkpoints in {folder} are those of another model: {'; '.join(refused)}. Resume with the settings "
            f"in {folder / 'config.yaml'}, start again with --overwrite, or name another train.output_dir"
        )
    return [str(change) for change in found if change.is_told]


def check_steps(folder: Path, steps: int) -> None:
    """The newest checkpoint is not beyond the end of the run.

    Raises:
        ValueError: it is, so that nothing but fewer steps than were made could be told of the result.
    """
    if (found := newest(folder)) and step_of(found) > steps:
        raise ValueError(
            f"{found} has {step_of(found)} steps behind it, and the run shall have {steps}: give train.steps "
            f"{step_of(found)} or more (or as many epochs), or start again with --overwrite"
        )


def changes(before: Any, now: Any, name: str = "") -> Iterator[Change]:
    """Settings that stand in both, and differ. One that only one of them has came with another version."""
    if isinstance(before, dict) and isinstance(now, dict) and before and now:
        for key in before.keys() & now.keys():
            yield from changes(before[key], now[key], f"{name}.{key}" if name else key)
    elif before != now:
        yield Change(name, before, now)


def below(name: str, sections: tuple[str, ...]) -> bool:
    return any(name == section or name.startswith(f"{section}.") for section in sections)


def shown(value: Any) -> str:
    """As a YAML has it."""
    return yaml.safe_dump(value, default_flow_style=True, width=1000).removesuffix("\n...\n").strip()
