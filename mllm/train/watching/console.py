"""The screen, for those who speak before and after the steps.

Enters: who is rank 0. Leaves: a console that is mute on all other ranks, so that a line is said once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console

if TYPE_CHECKING:
    from accelerate import Accelerator


def console(accelerator: Accelerator) -> Console:
    """The screen of rank 0; the others are mute."""
    return Console(quiet=not accelerator.is_main_process)
