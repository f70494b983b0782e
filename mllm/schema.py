"""The base of every configuration class: a plain dataclass whose unknown keys are errors.

Enters: nothing. Leaves: `Schema`, which `mllm/config.py` validates with pydantic (all mistakes at once, each with its
path) and turns into flags with tyro. Field docstrings are the help text.
"""

from __future__ import annotations

import difflib
from typing import Annotated, Any, ClassVar

from pydantic import Field

Positive = Annotated[int, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
NotNegative = Annotated[float, Field(ge=0)]
Rate = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Passes = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegativeInt = Annotated[int, Field(ge=0)]


class Schema:
    """Inherit and decorate with `@dataclass`. Fields are data: nothing changes them after parsing."""

    __pydantic_config__: ClassVar[Any] = {"extra": "forbid"}


def unknown_tag(discriminator: str, tag: str, expected_tags: str) -> str:
    """Words for a part of which there is no such kind."""
    kinds = [kind.strip("' ") for kind in expected_tags.split(",")]
    near = difflib.get_close_matches(tag, kinds, n=1)
    asked = f"did you mean {near[0]!r}? " if near else ""
    what = "format" if "format" in discriminator else discriminator.strip("'")
    return f"no {what} {tag!r}: {asked}There are {', '.join(kinds)}"
