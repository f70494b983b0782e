"""Scores that another program gave, such as MLM-Filter's.

Enters: a table of any kind that sources are read from (JSON lines, a JSON list, CSV, Parquet), or one JSON object of
ids and numbers. Leaves: the score of each id. Scores may be written as words (MLM-Filter's are); one that is no number
is no score.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mllm.data.containers import open_container
from mllm.data.files import find
from mllm.data.formats.record import column, mapping

IDS = ("id", "key", "__key__", "uid")
"""Names of the column of ids, the likeliest first; img2dataset and all who read its tars have `key`."""


class Scores:
    """The score of each id."""

    def __init__(self, path: str, key: str = "") -> None:
        """`key` names the column of scores.

        Raises:
            ValueError: no column of that name, or of ids; two scores of one id.
        """
        self.path = path
        self.by_id: dict[str, float] = {}
        for where, name, value in rows(path, key):
            score = number(value)
            if score is None:
                continue
            if self.by_id.setdefault(name, score) != score:
                raise ValueError(f"{where}: {name!r} has the score {self.by_id[name]:g} already: give each id one")

    def __call__(self, id: str) -> float | None:
        """The score of a sample: by its id, by that of its record (`ID#0` is a caption of ID), or by its key in a tar
        (`SHARD/KEY`)."""
        record = id.rpartition("#")[0] or id
        for name in (id, record, record.rpartition("/")[2]):
            if name in self.by_id:
                return self.by_id[name]
        return None


def rows(path: str, key: str) -> Iterator[tuple[str, str, Any]]:
    """Yield (file and row, id, score) of all files."""
    for file in find(path):
        table = plain_table(file.path)
        if table is not None:
            yield from ((file.name, name, value) for name, value in table.items())
            continue
        for row, (_, _, record) in enumerate(open_container(file.path).scan()):
            where = f"{file.name}, row {row}"
            try:
                record = mapping(record)
                name = column(record, IDS)
                if name is None:
                    raise ValueError(f"no id: it has {', '.join(record)[:200]}, but none of {', '.join(IDS)}")
                yield where, str(record[name]), record[key or score_column(record)]
            except KeyError as error:
                raise ValueError(
                    f"{where}: no column {error}, but {', '.join(record)[:200]}: see --score-key"
                ) from error
            except ValueError as error:
                raise ValueError(f"{where}: {error}") from error


def plain_table(path: Path) -> dict[str, Any] | None:
    """The one JSON object of ids and numbers that a file is, if it is one."""
    if path.suffix.lower() != ".json":
        return None
    with path.open("rb") as file:
        if not file.read(64).lstrip().startswith(b"{"):
            return None
    try:
        table = json.loads(path.read_bytes())
    except ValueError:  # lines of objects, or no JSON at all: whoever reads lines says so
        return None
    return table if all(value is None or number(value) is not None for value in table.values()) else None


def score_column(record: dict[str, Any]) -> str:
    """`score`, or the only column whose name ends so."""
    if "score" in record:
        return "score"
    found = [name for name in record if name.endswith("_score")]
    if len(found) != 1:
        told = f"several scores ({', '.join(found)})" if found else f"no score among {', '.join(record)[:200]}"
        raise ValueError(f"{told}: name the column with --score-key")
    return found[0]


def number(value: Any) -> float | None:
    """What can be compared with a threshold."""
    if isinstance(value, bool):
        return None
    try:
        score = float(value)
    except (TypeError, ValueError):
        return None
    return score if math.isfinite(score) else None
