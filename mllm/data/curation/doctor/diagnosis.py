"""What a data set has as a whole, from an examination of all its parts.

Enters: a source and its `Examination`. Leaves: every finding in the order of the files, those added that only show
when all is seen; advice where one setting would help against many of them; and the report as plain values.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from mllm.data.curation.doctor.classes import CLASSES, UNREAD, Finding
from mllm.data.curation.doctor.examination import SQUARE, Examination
from mllm.data.curation.source_options import format_of, in_words
from mllm.data.formats.auto import recognise
from mllm.data.formats.source import Place, Source
from mllm.data.imaging.zips import open_archive
from mllm.types import Mark, Message, Sample

NAMED = 1000
"""Repeated ids that are told in words; more of them would mean to read the set once more."""
MANY = 0.5
"""Share of the images that must be such squares before something is said."""
NEIGHBOURS = 50
"""Folders and archives in which missing images are looked for."""


def findings_of(source: Source, found: Examination) -> list[Finding]:
    """All findings in order."""
    order = {file.name: number for number, file in enumerate(source.files())}
    every = [*found.findings, *repeated_ids(source, found.names), *squares(source, found)]
    return sorted(every, key=lambda finding: (order[finding.file], -1 if finding.row is None else finding.row))


def repeated_ids(source: Source, names: np.ndarray) -> Iterator[Finding]:
    """Each record whose id an earlier one has."""
    names = names[np.lexsort((names[:, 4], names[:, 1]))]
    _, first, which, counts = np.unique(names[:, 0], return_index=True, return_inverse=True, return_counts=True)
    again = np.flatnonzero((counts[which] > 1) & (first[which] != np.arange(len(names))))
    for number, place in enumerate(again):
        shard, start, size, row = names[place, 1:].tolist()
        before = names[first[which[place]]].tolist()
        name = source.fetch(Place(shard, start, size, row)).id if number < NAMED else ""
        cause = f"the id {name!r} is also that of {source.origin(before[1], before[4]).where}"
        yield Finding("duplicate id", source.files()[shard].name, row, name, cause)


def squares(source: Source, found: Examination) -> Iterator[Finding]:
    """Whether the images are what img2dataset makes of them by default, small and framed in white."""
    number = int((found.sizes == SQUARE).all(axis=1).sum())
    if number > MANY * len(found.sizes):
        cause = (
            f"{number:,} of {len(found.sizes):,} images have 256 x 256 pixels, {found.bordered:,} of them white "
            f"borders: img2dataset's default, which loses detail and wastes visual tokens on borders"
        )
        yield Finding("256-pixel squares", source.files()[0].name, None, "", cause)


def advice(source: Source, found: Examination, findings: list[Finding]) -> list[str]:
    """Settings that would help against many findings at once."""
    said = []
    if found.records and not found.samples:
        try:
            kind = format_of(recognise(source.files()[0]))
        except ValueError:
            kind = format_of(source)
        if kind != format_of(source):
            said.append(f"no record is of the format {format_of(source)}, they look like {kind}: leave --format out")
    missing = next((finding for finding in findings if finding.kind == "missing image"), None)
    if missing and (folder := elsewhere(source, missing)):
        said.append(f"the images lie elsewhere: try --image-dir {folder}")
    return said


def elsewhere(source: Source, missing: Finding) -> Path | None:
    """A folder or archive nearby that holds the missing image under its name."""
    file = next(file for file in source.files() if file.name == missing.file)
    folder, match = source.images_from() or file.folder, UNREAD.match(missing.cause)
    if match is None or not Path(folder).is_dir() or not Path(match["name"]).is_relative_to(folder):
        return None
    name = Path(match["name"]).relative_to(folder)
    for near in (Path(file.folder), Path(folder), Path(file.folder).parent):
        for place in [near, *sorted(near.iterdir())[:NEIGHBOURS]]:
            if (place / name).is_file() or (place.suffix.lower() == ".zip" and in_archive(place, str(name))):
                return place
    return None


def in_archive(archive: Path, name: str) -> bool:
    try:
        return bool(open_archive(str(archive)).find(name))
    except Exception:  # any file may be called .zip
        return False


def exit_code(findings: list[Finding]) -> int:
    """The worst of the classes; 0 where nothing was found."""
    return min((CLASSES[finding.kind].code for finding in findings), default=0)


def first_sample(source: Source) -> str:
    """The first sample as it is understood, a line a turn."""
    try:
        for sample in (item for item in source.read() if isinstance(item, Sample)):
            return "\n".join(f"  {message.role}: {in_line(message)}" for message in sample.messages)
    except ValueError:  # a broken file, which the examination tells
        pass
    return "  (none)"


def in_line(message: Message) -> str:
    return repr("".join("[image]" if part is Mark.IMAGE else str(part) for part in message.content)[:200])


def report(source: Source, found: Examination, findings: list[Finding]) -> dict[str, Any]:
    """Everything as plain values, for JSON."""
    counts = Counter(finding.kind for finding in findings)
    width, height = np.median(found.sizes, axis=0).tolist() if len(found.sizes) else (0, 0)
    return {
        "path": str(source.path),
        "layout": in_words(source),
        "format": format_of(source),
        "files": [file.name for file in source.files()],
        **{name: getattr(found, name) for name in ("records", "filtered", "samples", "text_only", "images")},
        "median_size": [width, height],
        "smallest_side": int(found.sizes.min()) if len(found.sizes) else 0,
        "largest_side": int(found.sizes.max()) if len(found.sizes) else 0,
        "counts": {kind: counts[kind] for kind in CLASSES if counts[kind]},
        "advice": advice(source, found, findings),
        "exit_code": exit_code(findings),
        "findings": [{**finding._asdict(), "remedy": CLASSES[finding.kind].remedy} for finding in findings],
    }
