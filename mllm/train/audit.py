"""The audit of a stage: did exactly those weights move that the table says train?

Enters: the model as its engine holds it, at the start, at the first checkpoint and at the end. Leaves: names of
declared weights that never moved (a warning) and of frozen ones that did (an error), in `audit.json` of the stage
folder. What `mllm/reload.py` finds about the written stage goes into the same file.

Of each tensor two numbers are kept from the start. Each rank looks at what it holds itself, so that no shard travels.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from mllm.models.multimodal import MultimodalLM
from mllm.train.checkpoint import checkpoints
from mllm.train.engines.shards import put_together
from mllm.train.trainable import trained_weights

if TYPE_CHECKING:
    from collections.abc import Callable

    from accelerate import Accelerator


AuditMode = Literal["full", "quick", "off"]
FILE = "audit.json"
SAMPLED = 4096
"""Numbers of a frozen tensor that are looked at, evenly spread: an optimiser that had it would move them all."""
CHUNK = 2**22
"""Numbers read at a time: the copies for this take 48 MB."""
NAMED = 5
"""Weights named on the screen; the file has them all."""


class Audit:
    """What every weight was at the start, and what was found since. Every rank makes one and calls it."""

    def __init__(
        self, accelerator: Accelerator, model: MultimodalLM, mode: AuditMode, folder: Path, say: Callable[[str], None]
    ) -> None:
        self.accelerator, self.model, self.folder, self.say = accelerator, model, folder, say
        self.is_on, self.is_first = mode != "off", True
        self.declared = set(trained_weights(model))
        self.start = self.fingerprints() if self.is_on else {}
        self.report: dict[str, Any] = {"mode": mode}

    def fingerprints(self) -> dict[str, tuple[int, int]]:
        return {name: fingerprint(held(p), name in self.declared) for name, p in self.model.named_parameters()}

    def first_save(self, steps: int) -> None:
        """Behind the first checkpoint, `steps` behind the start.

        Raises:
            ValueError: a frozen weight moved, or the file does not hold what is in memory.
        """
        if not (self.is_on and self.is_first):
            return
        self.is_first = False
        found = self.compare(steps)
        found["file"] = self.differences()
        self.write("first_save", found)
        if wrong := error(found):
            raise ValueError(wrong)

    def finish(self, steps: int) -> None:
        """Behind the last step; what is wrong is told when the stage is written (`concluded`)."""
        if self.is_on and steps:
            self.write("end", self.compare(steps))

    def compare(self, steps: int) -> dict[str, Any]:
        """Names by what happened to them, on any rank."""
        now = self.fingerprints()
        moved = torch.tensor([float(now[name] != self.start[name]) for name in now], device=self.accelerator.device)
        moved = self.accelerator.reduce(moved, "sum")
        has_moved = {name for name, ranks in zip(now, moved.tolist(), strict=True) if ranks}
        # B starts at zero, so that A has no gradient in the very first step
        may_stand = {name for name in self.declared if ".lora_A." in name} if steps < 2 else set()
        return {
            "steps": steps,
            "declared": len(self.declared),
            "frozen": len(now) - len(self.declared),
            "never_moved": sorted(self.declared - has_moved - may_stand),
            "frozen_but_moved": sorted(has_moved - self.declared),
        }

    def differences(self) -> list[str]:
        """Weights whose tensor in the newest checkpoint is not the one in memory: missing, empty, other numbers."""
        from safetensors import safe_open

        is_main, wrong = self.accelerator.is_main_process, []
        own = trained_weights(self.model)
        saved = safe_open(str(checkpoints(self.folder)[-1] / "trained.safetensors"), "pt") if is_main else None
        names = set(saved.keys()) if saved else set()
        for name, parameter in own.items():
            tensor = put_together(parameter, is_main)
            if saved and tensor is not None and not (name in names and torch.equal(saved.get_tensor(name), tensor)):
                wrong.append(name)
        return wrong + sorted(names - own.keys())

    def write(self, moment: str, found: dict[str, Any]) -> None:
        """Into the file; what is worth a warning on the screen too."""
        if not self.accelerator.is_main_process:
            return
        self.report[moment] = found
        (self.folder / FILE).write_text(json.dumps(self.report, indent=2) + "\n")
        if names := found["never_moved"]:
            self.say(
                f"warning: {len(names)} of {found['declared']} weights that train have not moved in "
                f"{found['steps']} steps: {listed(names)}"
            )


def held(parameter: Any) -> Tensor:
    """What this rank holds of a weight: all of it, or its share without the padding of the last one."""
    if hasattr(parameter, "ds_tensor"):
        share = parameter.ds_tensor.detach().flatten()
        before = torch.distributed.get_rank() * share.numel()
        return share[: max(0, parameter.ds_numel - before)]
    own: Tensor = (parameter.to_local() if hasattr(parameter, "to_local") else parameter).detach()
    return own.flatten()


def fingerprint(tensor: Tensor, every: bool) -> tuple[int, int]:
    """Sum and sum of squares of the bits [M], of every number or of a sample; the order of adding does not matter."""
    if not every and len(tensor) > SAMPLED:
        tensor = tensor[:: -(-len(tensor) // SAMPLED)]
    total = torch.zeros(2, dtype=torch.int64, device=tensor.device)
    for chunk in tensor.split(CHUNK):
        bits = (chunk.float().view(torch.int32) if chunk.is_floating_point() else chunk).to(torch.int64)
        total += torch.stack([bits.sum(), (bits * bits).sum()])
    first, second = total.tolist()
    return first, second


def error(found: dict[str, Any]) -> str:
    """What must not be, in words; empty where all is well."""
    if names := found.get("frozen_but_moved"):
        return f"{len(names)} frozen weights moved: {listed(names)}. Something outside the table of rates changed them"
    if names := found.get("file"):
        return f"the first checkpoint does not hold what is in memory: {listed(names)}. Do not trust this run's files"
    return ""


def listed(names: list[str]) -> str:
    return ", ".join(names[:NAMED]) + (f" and {len(names) - NAMED} more" if len(names) > NAMED else "")


def concluded(folder: Path, reloaded: dict[str, Any], console: Console) -> str:
    """Add what came back from disk to the file, print all of it as one table; the first mistake in words, or
    nothing."""
    path = folder / FILE
    report = json.loads(path.read_text()) if path.is_file() else {}
    report["reload"] = reloaded
    wrong = error(report.get("end", {})) or reloaded.get("error", "")
    report["ok"] = not wrong
    path.write_text(json.dumps(report, indent=2) + "\n")
    console.print(table(report))
    return wrong


def table(report: dict[str, Any]) -> Table:
    shown = Table("", "", show_header=False, title="audit", title_justify="left")
    if end := report.get("end"):
        shown.add_row("trained weights that moved", f"{end['declared'] - len(end['never_moved'])} of {end['declared']}")
        shown.add_row("frozen weights that moved", f"{len(end['frozen_but_moved'])} of {end['frozen']}")
    reloaded = report["reload"]
    where = "in a fresh process" if reloaded.get("process") == "fresh" else "into a model built anew"
    if "difference" in reloaded:
        shown.add_row(f"read back {where}", f"logits differ by {reloaded['difference']:.1e} of the largest")
    if "merged_difference" in reloaded:
        shown.add_row("adapter merged", f"logits differ by {reloaded['merged_difference']:.1e} of the largest")
    if "merged_skipped" in reloaded:
        shown.add_row("adapter merged", reloaded["merged_skipped"])
    return shown
