"""The optimiser of a stage.

Enters: the parameter groups of `train/trainable.py`. Leaves: AdamW, or Muon for matrices with AdamW for all else,
behind the face of one torch optimiser, so that accelerate, checkpoints and the schedule need not know which.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch

OptimizerName = Literal["adamw", "muon"]


def make_optimizer(groups: list[dict[str, Any]], name: OptimizerName) -> torch.optim.Optimizer:
    """AdamW with torch's betas, or `MuonWithAdamW`."""
    return torch.optim.AdamW(groups) if name == "adamw" else MuonWithAdamW(groups)


class MuonWithAdamW(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024) steps each matrix along the nearest orthogonal one to its momentum; torch's own.

    Vectors (biases, norms) have no such direction and take AdamW's step. The scale of a matrix' step is matched to
    AdamW's (Liu et al. 2025, "Muon is scalable", section 2.2), so that one table of rates serves both.
    """

    def __init__(self, groups: list[dict[str, Any]]) -> None:
        matrices = [group for group in groups if group["params"][0].ndim == 2]
        others = [group for group in groups if group["params"][0].ndim != 2]
        self.parts: list[torch.optim.Optimizer] = []
        if matrices:
            self.parts.append(torch.optim.Muon(matrices, adjust_lr_fn="match_rms_adamw"))
        if others:
            self.parts.append(torch.optim.AdamW(others))
        super().__init__([group for part in self.parts for group in part.param_groups], {})

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        for part in self.parts:
            part.step()

    def state_dict(self) -> dict[str, Any]:
        """torch's layout, the parts' states and groups one after the other."""
        saved = [part.state_dict() for part in self.parts]
        return {
            "state": {number: part["state"] for number, part in enumerate(saved)},
            "param_groups": [group for part in saved for group in part["param_groups"]],
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        groups = iter(state_dict["param_groups"])
        for number, part in enumerate(self.parts):
            own = [next(groups) for _ in part.param_groups]
            part.load_state_dict({"state": state_dict["state"][number], "param_groups": own})
        self.param_groups = [group for part in self.parts for group in part.param_groups]
