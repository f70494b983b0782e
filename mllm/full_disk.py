"""A disk that takes no more, in words.

Enters: an error that ended a run. Leaves: what could not be written, or nothing where it is about something else. Who
writes (Python, torch, safetensors, Pillow) tells it in another way, and one error may have come while another was on
its way.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator

REFUSED = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
"""Full, beyond what the user may take, beyond the size of a file, or read-only."""
WORDS = ("inline_container", "iostream error", *(f"(os error {number})" for number in REFUSED))
"""How torch and safetensors say it, without a number."""


def unwritten(error: BaseException) -> str:
    """What the disk would not take, in the words of the one who wrote."""
    for each in chain(error):
        if isinstance(each, OSError) and each.errno in REFUSED:
            return str(each)
    return next((line(each) for each in chain(error) if any(word in str(each) for word in WORDS)), "")


def chain(error: BaseException | None) -> Iterator[BaseException]:
    """The error, and those that it came from or came in the way of."""
    while error:
        yield error
        error = error.__cause__ or error.__context__


def line(error: BaseException) -> str:
    return str(error).partition("\n")[0]
