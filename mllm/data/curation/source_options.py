"""A source from the words of a command line, as a recipe's YAML would describe it.

Enters: a path and, if need be, a format and its options. Leaves: a `Source` whose format is settled: where none was
named, the records were asked. And what it is, in words.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import fields
from itertools import islice
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter, ValidationError

from mllm.data.files import SUFFIXES, is_url
from mllm.data.formats import SourceConfig
from mllm.data.formats.auto import AutoSource
from mllm.data.formats.source import Source
from mllm.schema import unknown_tag

CONTAINERS = {"JsonList": "one JSON list", "JsonLines": "JSON lines", "Cells": "a table of text", "Tar": "tar"}
LOOKED_AT = 10_000
"""Files of a folder that are counted to say what it holds."""


def source_of(
    path: str, format: str = "auto", image_dir: str | None = None, split: str = "", subset: str = "", options: str = ""
) -> Source:
    """The source that a section of `data.sources` with these words would be; `options` is a YAML mapping.

    Raises:
        ValueError: an option is unknown or wrong, there are no files, or the format cannot be told.
    """
    try:
        extra = yaml.safe_load(options) if options else {}
    except yaml.YAMLError as error:
        raise ValueError(f"options are no YAML ({error}): write them as '{{prompt: Describe the image.}}'") from error
    if not isinstance(extra, dict):
        raise ValueError(f"options must be a mapping, found {extra!r}: write them as '{{prompt: Describe the image.}}'")
    named = {"path": path, "format": format, "image_dir": image_dir, "split": split, "subset": subset}
    if given := named.keys() & extra.keys():
        raise ValueError(f"options hold {', '.join(sorted(given))}, which have flags of their own: use these")
    try:
        source: Source = TypeAdapter(SourceConfig).validate_python({**named, **extra})
    except ValidationError as error:
        mistakes = "; ".join(explain(mistake) for mistake in error.errors())
        raise ValueError(f"the source has mistakes: {mistakes}") from error
    if not is_url(path) and Path(path).is_dir():
        require_records(Path(path), source)
    return source.chosen() if isinstance(source, AutoSource) else source


def require_records(folder: Path, source: Source) -> None:
    """Raise a `ValueError` that says what a folder holds instead of files of records."""
    try:
        source.files()
    except ValueError as error:
        if not str(error).startswith("no data file"):
            raise
        suffixes = Counter(path.suffix for path in islice(folder.rglob("*"), LOOKED_AT) if path.is_file())
        held = ", ".join(f"{number} {suffix or 'without a suffix'}" for suffix, number in suffixes.most_common(5))
        raise ValueError(
            f"{folder} holds no files of records ({held or 'nothing'}): name the file that says which words belong to "
            f"which image; its name ends in one of {', '.join(SUFFIXES)}"
        ) from error


def explain(mistake: Any) -> str:
    """One mistake, and what to do where the format was not named."""
    if mistake["type"] == "union_tag_invalid":
        return unknown_tag(**mistake["ctx"])
    where = ".".join(map(str, mistake["loc"][1:]))
    if mistake["type"] == "unexpected_keyword_argument" and mistake["loc"][0] == "auto":
        return f"{where} is an option of some formats: name the format with --format"
    return f"{where}: {mistake['msg']}" if where else mistake["msg"]


def in_words(source: Source) -> str:
    """What was recognised: "llava, one JSON list, 3 files"."""
    files = source.files()
    kind = type(source.container(files[0])).__name__
    suffix = Path(files[0].name.partition("?")[0]).suffix
    container = CONTAINERS.get(kind, f"a table ({suffix})" if kind == "ArrowRows" else "an annotation file")
    return f"{format_of(source)}, {container}, {len(files)} file{'s' * (len(files) > 1)}"


def format_of(source: Source | type[Source]) -> str:
    """The name of its format."""
    return str(next(field.default for field in fields(source) if field.name == "format"))
