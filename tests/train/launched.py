"""A real recipe in which something goes wrong on one rank:

    python -m torch.distributed.run ... tests/train/launched.py CASE RANK recipes/pretrain.py --config ...

`CASE` is `error` (an exception in the forward pass of the second step) or `stopped` (SIGSTOP while the samples of the
third step are read; the moment is noted in a file `stopped` beside the output folder).
"""

from __future__ import annotations

import os
import runpy
import signal
import sys
from pathlib import Path
from typing import Any

from mllm.data.loader import PlannedBatches
from mllm.train.losses import NextToken


def fail_in_forward() -> None:
    forward = NextToken.forward
    calls: list[str] = []

    def failing(self: NextToken, *arguments: Any, **named: Any) -> Any:
        calls.extend(["step"] * ("reduction" in named))  # the preflight's probe has none
        if len(calls) == 2:
            raise ValueError("this batch is bad")
        return forward(self, *arguments, **named)

    NextToken.forward = failing  # type: ignore[method-assign]


def stop_in_loading(note: Path) -> None:
    load = PlannedBatches.__getitem__
    calls: list[int] = []

    def stopping(self: PlannedBatches, rows: list[list[int]]) -> Any:
        calls.append(1)
        if len(calls) == 3:
            note.write_text("\n".join(self.names(rows)))
            os.kill(os.getpid(), signal.SIGSTOP)
        return load(self, rows)

    PlannedBatches.__getitem__ = stopping  # type: ignore[method-assign]


if __name__ == "__main__":
    case, rank, script = sys.argv[1:4]
    if os.environ["RANK"] == rank:
        fail_in_forward() if case == "error" else stop_in_loading(Path(os.environ["NOTE"]))
    sys.argv = sys.argv[3:]
    sys.path.insert(0, str(Path(script).parent))
    runpy.run_path(script, run_name="__main__")
