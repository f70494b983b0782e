"""The command line of a data script: its flags, its exit code, and mistakes in one line.

Enters: the script's `main` and its text. Leaves: an exit code: what `main` returns (0 where it returns nothing), 2
for a mistake, 130 after Ctrl-C.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from typing import Any


def run(
    main: Callable[..., Any], description: str | None, arguments: list[str] | None = None, stopped: str = ""
) -> int:
    """Call `main` with the flags; `stopped` is said after Ctrl-C."""
    import tyro

    warnings.filterwarnings("ignore", module="PIL")  # what it finds odd and reads is read; what it cannot is told
    try:
        return tyro.cli(main, args=arguments, description=description) or 0
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        if stopped:
            print(f"\n{stopped}", file=sys.stderr)
        return 130
