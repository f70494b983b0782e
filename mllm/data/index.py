"""One pass over the sources before anything is trained: how long each sample is, and which records cannot be used.

Enters: sources and a processor. Leaves: an `Index`. Images are opened as far as their header, tokens are counted and
forgotten. What is wrong with the data is known here, all of it, before the first step.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from mllm.data.formats.source import Source
from mllm.data.images import image_size
from mllm.data.processor import Processor
from mllm.types import IGNORE_INDEX, Sample

SHOWN = 5
"""Faults told in an error; the quarantine file names them all."""


@dataclass
class Index:
    """Per good sample its length and counts; the faults of the others."""

    samples: list[Sample] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    """Tokens of each sample, visual tokens included."""
    supervised: list[int] = field(default_factory=list)
    """Tokens of each sample that carry a loss."""
    truncated: int = 0
    """Samples that were cut to `max_length`."""
    faults: list[str] = field(default_factory=list)
    """One line a record that was not used: file, row and what is wrong."""
    ids: Counter[str] = field(default_factory=Counter)
    """How often each id was read: the second `a` becomes `a~1`, since state of a sample hangs on its id."""

    @property
    def num_images(self) -> int:
        return sum(len(sample.images) for sample in self.samples)

    @property
    def bad_share(self) -> float:
        """Share of all records read that cannot be used."""
        return len(self.faults) / max(1, len(self.faults) + len(self.samples))

    def check(self, max_bad_share: float, quarantine: Path | None = None) -> None:
        """Write the faults down, and stop if there are too many or nothing is left.

        Raises:
            ValueError: tells the first faults and the remedy.
        """
        if self.faults and quarantine:
            quarantine.write_text("".join(json.dumps({"fault": fault}) + "\n" for fault in self.faults))
        if self.samples and self.bad_share <= max_bad_share:
            return
        if not self.faults:
            raise ValueError("the data files hold no records: check the paths under data.sources")
        shown = "\n  ".join(self.faults[:SHOWN])
        more = f"\n  ... and {len(self.faults) - SHOWN} more" if len(self.faults) > SHOWN else ""
        raise ValueError(
            f"{len(self.faults)} of {len(self.faults) + len(self.samples)} records cannot be used "
            f"(data.max_bad_share allows {max_bad_share:.1%}):\n  {shown}{more}\n"
            f"Mend or remove them, or raise data.max_bad_share; skipped records are named in quarantine.jsonl"
        )


def build_index(sources: Iterable[Source], processor: Processor, max_length: int, progress: bool = True) -> Index:
    """Read every record of every source once."""
    from rich.progress import track

    index = Index()
    for source in sources:
        label = f"index {source.path.name}"
        for item in track(source.read(), label, disable=not progress, transient=True):
            if isinstance(item, ValueError):
                index.faults.append(str(item))
            else:
                add(index, item, processor, max_length)
    return index


def add(index: Index, sample: Sample, processor: Processor, max_length: int) -> None:
    """Measure one sample; what cannot be used becomes a fault."""
    index.ids[sample.id] += 1
    if index.ids[sample.id] > 1:
        sample.id = f"{sample.id}~{index.ids[sample.id] - 1}"
    try:
        for image in sample.images:
            image_size(image)
        full, _ = processor.encode(sample)
        ids, labels = (full, _) if len(full) <= max_length else processor.encode(sample, max_length)
    except ValueError as error:
        text = str(error)
        index.faults.append(text if text.startswith(sample.where) else f"{sample.where}: {text}")
        return
    index.samples.append(sample)
    index.lengths.append(len(ids))
    index.supervised.append(sum(label != IGNORE_INDEX for label in labels[1:]))
    index.truncated += len(ids) < len(full)
