"""What 8-bit floats in the frozen layers do to the gradient, and to what is learned.

Enters: the folder of the tiny recipe. Leaves: cosines by what is multiplied so (`fp8_cosines`), of LLMs with weights at
random and of two that are trained, and the loss curves of align runs with and without (`fp8_curve`).
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks import fp8_cosines, fp8_curve


def measure(home: Path, rows: int, steps: int | None, say: Callable[[str], None]) -> dict[str, Any]:
    """All numbers, as JSON holds them."""
    torch.set_num_threads(1)
    say("making what the tiny recipe starts from, where it is missing")
    fp8_curve.parts(home)
    llms = {"tiny": home / "parts" / "llm", "deep": fp8_curve.deep(home)}
    models = {}
    for name, by in fp8_cosines.NARROWER.items():
        say(f"cosines of {name}, narrower by {by}")
        models[name] = fp8_cosines.asked(fp8_cosines.narrow(name, by), fp8_cosines.drawn_rows(rows))
    with tempfile.TemporaryDirectory() as folder:
        for name, llm in llms.items():
            say(f"cosines of {name}")
            models[name] = fp8_cosines.asked(*fp8_curve.beginning(home, Path(folder), llm, rows))
        say("align runs with and without")
        return {"models": models, "curve": fp8_curve.measure(home, Path(folder), steps)}
