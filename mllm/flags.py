"""Flags laid over a YAML before it is validated.

Enters: the raw mapping of a YAML file and the command line. Leaves: the mapping with every `--section.key value` in
its place, and the arguments that are left (switches such as `--resume`, and `--help`). So a flag reaches what the
file leaves out (`--train.lora.rank 8`), chooses another part (`--model.connector.type qformer`), and is checked as
the file is.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

DOTTED = re.compile(r"--(?P<path>[a-z_]+(\.[a-z0-9_]+)+)(=(?P<value>.*))?", re.DOTALL)
TAGS = ("type", "format")
"""Keys that choose one of several shapes: another choice makes its neighbours meaningless."""


def split_flags(arguments: list[str]) -> tuple[list[tuple[list[str], str]], list[str]]:
    """(path, value) of each dotted flag, the choices of parts first; and the other arguments."""
    found, rest = [], []
    waiting = list(arguments)
    while waiting:
        match = DOTTED.fullmatch(waiting[0])
        value = match["value"] if match else None
        if match and value is None and len(waiting) > 1 and not waiting[1].startswith("--"):
            value = waiting.pop(1)
        if match and value is not None:
            found.append((match["path"].split("."), value))
        else:
            rest.append(waiting[0])
        waiting.pop(0)
    return sorted(found, key=lambda flag: flag[0][-1] not in TAGS), rest


def lay_over(raw: dict[str, Any], path: list[str], text: str, loader: type[yaml.SafeLoader]) -> None:
    """Put one value in its place, making the sections on the way.

    Raises:
        ValueError: the path leads through a value, or past the end of a list.
    """
    *sections, last = path
    place: Any = raw
    for section in sections:
        place = enter(place, section, path)
    value = yaml.load(text, Loader=loader) if text.strip() else text
    if isinstance(place, list):
        place[position(place, last, path)] = value
    elif last in TAGS and place.get(last) != value:
        kept = {"path", "image_dir", "split", "subset"} if last == "format" else set()
        for neighbour in [key for key in place if key not in kept]:
            del place[neighbour]
        place[last] = value
    else:
        place[last] = value


def enter(place: Any, section: str, path: list[str]) -> Any:
    """The section below `place`, made if it is not there."""
    if isinstance(place, list):
        return place[position(place, section, path)]
    if place.get(section) is None:
        place[section] = {}
    if not isinstance(place[section], dict | list):
        raise ValueError(f"--{'.'.join(path)}: {section} is a value, not a section")
    return place[section]


def position(place: list[Any], text: str, path: list[str]) -> int:
    if not text.isdigit() or int(text) >= len(place):
        raise ValueError(f"--{'.'.join(path)}: {text!r} is no place in a list of {len(place)}")
    return int(text)
