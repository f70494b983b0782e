"""What a filter leaves behind.

Enters: a verdict and the lines it was passed on. Leaves: `kept.jsonl` (id and place of each sample that stays),
`removed.jsonl` (and why, for every other one), `scores.jsonl` (all scores of all samples); and, where asked for, the
kept records themselves in files like those they came from.
"""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any

from mllm.data.containers.json_lines import JsonLines, read_at
from mllm.data.containers.json_list import JsonList
from mllm.data.curation.filters.measure import Line
from mllm.data.curation.filters.verdict import Verdict
from mllm.data.formats.captions import CaptionsSource, numbered
from mllm.data.formats.source import Source

KEPT, REMOVED, SCORES, RECORDS = "kept.jsonl", "removed.jsonl", "scores.jsonl", "records"
OWN = ("id", "looks", "shard", "row", "part", "fault", "cause")
"""Of a line, what is no score."""
Kept = dict[int, dict[int, set[int]]]
"""shard -> row -> the samples of the record that stay."""


def write_lists(out: Path, lines: Iterable[Line], faults: list[dict[str, Any]], verdict: Verdict, scores: Any) -> Kept:
    """Write the three lists; returns what of each record stays. `scores` are those from outside, or None."""
    kept: Kept = defaultdict(lambda: defaultdict(set))
    with ExitStack() as stack:
        stays, goes, all_scores = (stack.enter_context(whole(out / name)) for name in (KEPT, REMOVED, SCORES))
        for number, line in enumerate(lines):
            named = {"id": verdict.ids[number], "where": line["where"]}
            told = {key: value for key, value in line.items() if key not in (*OWN, "where")}
            if scores is not None:
                told["score"] = None if line["id"] is None else scores(line["id"])
            put(all_scores, {**named, **told})
            reasons = verdict.reasons.get(number)
            if reasons is None:
                put(stays, named)
                kept[line["shard"]][line["row"]].add(line["part"])
            else:
                more = [f"{reason.rule}: {reason.told}" for reason in reasons[1:]]
                put(goes, {**named, "rule": reasons[0].rule, "reason": reasons[0].told, "also": more})
        for fault in faults:
            place = {"id": None, "where": f"{fault['file']}, row {fault['row']}"}
            put(goes, {**place, "rule": "unreadable", "reason": f"record: {fault['cause']}", "also": []})
    return kept


def put(file: IO[str], line: Any) -> None:
    file.write(json.dumps(line, ensure_ascii=False) + "\n")


@contextmanager
def whole(path: Path) -> Iterator[IO[str]]:
    """A file that is there whole or as it was before."""
    unfinished = path.with_name(f".{path.name}.tmp")
    with unfinished.open("w", encoding="utf-8") as file:
        yield file
    os.replace(unfinished, path)


def check_writable(source: Source) -> None:
    """Only records of JSON can be written as they were.

    Raises:
        ValueError: the source is something else.
    """
    for file in source.files():
        if not isinstance(source.container(file), JsonLines | JsonList):
            raise ValueError(
                f"--records writes JSON lines and JSON lists, and {file.name} is neither: use {KEPT}, or write the "
                f"kept samples with a program for that kind of file"
            )


def write_records(out: Path, source: Source, kept: Kept) -> list[Path]:
    """One file for each file of the source, in its order and layout: the records, to the byte, of which a sample stays;
    a list of captions of which some go is thinned."""
    written = []
    for shard, file in enumerate(source.files()):
        container = source.container(file)
        assert isinstance(container, JsonLines | JsonList)
        is_list = isinstance(container, JsonList)
        suffix = ".json" if is_list else ".jsonl"
        path = out / RECORDS / f"{file.stem}{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole(path) as target:
            texts = kept_texts(source, container, kept.get(shard, {}))
            target.write("[\n" if is_list else "")
            for number, text in enumerate(texts):
                target.write((",\n" if number else "") + text if is_list else text + "\n")
            target.write("\n]\n" if is_list else "")
        written.append(path)
    return written


def kept_texts(source: Source, container: JsonLines | JsonList, kept: dict[int, set[int]]) -> Iterator[str]:
    """The text of each record that stays."""
    for row, (start, size, record) in enumerate(container.scan()):
        if row in kept:
            thin = thinned(source, record, kept[row])
            yield (
                read_at(container.file.fileno(), start, size).decode().strip()
                if thin is None
                else json.dumps(thin, ensure_ascii=False)
            )


def thinned(source: Source, record: Any, parts: set[int]) -> Any:
    """The record with those captions alone that stay; None if all do."""
    if not isinstance(source, CaptionsSource):
        return None
    captions = source.variants(record) if source.text else numbered(record)
    if len(parts) == len(captions):
        return None
    if source.text:
        gone = {name for number, (name, _, _) in enumerate(captions) if number not in parts}
        return {key: value for key, value in record.items() if key not in gone}
    name = captions[0][0]
    return {**record, name: [caption for number, (_, _, caption) in enumerate(captions) if number in parts]}
