"""Where a thread stands, read from outside of it.

Enters: a thread's number. Leaves: the innermost line of its stack that is neither torch's nor DeepSpeed's, and whether
it waits for other ranks there.
"""

from __future__ import annotations

import sys
from pathlib import Path

DEEPEST = 30
"""Frames that are looked at."""
INNERMOST = 12
"""Of these, where an exchange shows."""
EXCHANGES = ("torch/distributed/", "nn/parallel/distributed", "deepspeed/comm", "torch/autograd/graph")


def where(thread: int) -> tuple[str, bool]:
    """The line as `file.py:12 in function` (nothing, if the thread is gone), and whether it is in an exchange."""
    frame = sys._current_frames().get(thread)
    names: list[tuple[str, int, str]] = []
    while frame and len(names) < DEEPEST:
        names.append((frame.f_code.co_filename, frame.f_lineno, frame.f_code.co_name))
        frame = frame.f_back
    own = next((name for name in names if "/torch/" not in name[0] and "/deepspeed/" not in name[0]), None)
    inside = any(part in name[0] for name in names[:INNERMOST] for part in EXCHANGES)
    return (f"{Path(own[0]).name}:{own[1]} in {own[2]}" if own else ""), inside
