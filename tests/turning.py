"""A way to train for `test_benchmark_peers.py`, in a file that is imported at once by the process that runs it."""

from __future__ import annotations

import os
from pathlib import Path


def three_steps(folder: Path) -> list[tuple[float, int]]:
    """Of one weight; each writes down that it was its turn, and on how many threads."""
    import torch

    weight = torch.nn.Linear(1, 1)
    optimizer = torch.optim.SGD(weight.parameters(), 0.1)
    for step in range(3):
        weight(torch.ones(1, 1)).sum().backward()
        with (folder / "order.txt").open("a") as file:
            file.write(f"{os.environ['OMP_NUM_THREADS']} {step}\n")
        optimizer.step()
    return [(1.0, 5)] * 3
