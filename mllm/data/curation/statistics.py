"""What a data set is made of, in numbers: lengths, images, sources, what is learned, how well rows fill.

Enters: an `Index`. Leaves: a mapping that is JSON as it stands and adds up to the index: each histogram counts every
sample once, the sources sum to the whole.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from mllm.data.index import Index
from mllm.data.planning.advisor import MULTIPLE, best, fills
from mllm.types import Mark, Sample

Numbers = np.ndarray
QUANTILES = (1, 5, 25, 50, 75, 95, 99)
BARS = 48
"""Of a histogram, about."""
SHORTEST_ROW, LONGEST_ROW = 512, 8192
"""Row lengths that are looked at, unless a longer one is asked about."""
WIDEST = 14
"""Steps that a chart of image sizes has at least."""
COMMONEST = 10
EXCERPT = 600
"""Characters of an example."""


def statistics(index: Index, unit: str = "tokens", seq_length: int | None = None, shift: int = 0) -> dict[str, Any]:
    """All numbers. `shift` is what each length holds beside its units; fill is told of tokens alone."""
    if not len(index):
        raise ValueError(f"no sample can be read. The first fault: {next(iter(index.faults), 'the files are empty')}")
    lengths, supervised = index.length.astype(np.int64) - shift, index.supervised.astype(np.int64)
    sizes = image_sizes(index)
    return {
        "unit": unit,
        "read": index.read,
        "samples": len(index),
        "images": index.num_images,
        "length": int(lengths.sum()),
        "supervised": int(supervised.sum()),
        "supervised_share": share(supervised.sum(), lengths.sum()),
        "faults": dict(Counter(fault.kind for fault in index.faults)),
        "filtered": dict(index.filtered),
        "sources": sources(index, lengths, supervised),
        "lengths": {**spread(lengths), **histogram(lengths, index.source, len(index.sources))},
        "supervised_shares": shares(supervised, lengths),
        "images_per_sample": counted(index.images),
        "image_sizes": {"width": spread(sizes[:, 0]), "height": spread(sizes[:, 1]), **grid(sizes)},
        "fill": fill(lengths, seq_length) if unit == "tokens" else None,
    }


def share(part: Any, whole: Any) -> float:
    return round(float(part) / float(whole), 4) if whole else 0.0


def image_sizes(index: Index) -> Numbers:
    """int64 [images, 2]: width and height of each image as it is shown."""
    return np.asarray(index.sizes.flatten(), dtype=np.int64).reshape(-1, 2)


def sources(index: Index, lengths: Numbers, supervised: Numbers) -> list[dict[str, Any]]:
    """A line of sums for each source."""
    count = len(index.sources)

    def sums(values: Numbers | None = None) -> list[int]:
        return np.bincount(index.source, values, count).astype(np.int64).tolist()

    columns = {
        "samples": sums(),
        "text_only": sums(index.images == 0),
        "images": sums(index.images),
        "length": sums(lengths),
        "supervised": sums(supervised),
    }
    names = told_apart([source.name for source in index.sources])
    lines = [{"name": name, **{key: each[n] for key, each in columns.items()}} for n, name in enumerate(names)]
    return [
        {
            **line,
            "share_of_samples": share(line["samples"], len(index)),
            "share_of_length": share(line["length"], lengths.sum()),
            "supervised_share": share(line["supervised"], line["length"]),
        }
        for line in lines
    ]


def told_apart(names: Sequence[str]) -> list[str]:
    """The second of a name is `NAME (2)`."""
    seen: Counter[str] = Counter()
    told = []
    for name in names:
        seen[name] += 1
        told.append(name if seen[name] == 1 else f"{name} ({seen[name]})")
    return told


def spread(values: Numbers) -> dict[str, Any]:
    """Mean, extremes and quantiles; nothing of nothing."""
    if not len(values):
        return {}
    quantiles = np.quantile(values, np.array(QUANTILES) / 100, method="nearest")
    told = {str(name): int(value) for name, value in zip(QUANTILES, quantiles, strict=True)}
    return {
        "mean": round(float(values.mean()), 2),
        "min": int(values.min()),
        "max": int(values.max()),
        "quantiles": told,
    }


def histogram(values: Numbers, source: Numbers, number: int) -> dict[str, Any]:
    """`counts[source][bar]` between `edges`; logarithmic where most values are far below the largest."""
    low, high = int(values.min()), int(values.max())
    is_log = low > 0 and high > 6 * max(1, float(np.median(values))) and high - low > BARS
    if is_log:
        edges = np.unique(np.rint(np.geomspace(low, high + 1, BARS + 1)).astype(np.int64))
    else:
        step = max(1, -(-(high - low + 1) // BARS))
        edges = np.arange(low, high + step + 1, step)
    counts = [np.histogram(values[source == each], edges)[0].tolist() for each in range(number)]
    return {"is_log": is_log, "edges": edges.tolist(), "counts": counts}


def shares(supervised: Numbers, lengths: Numbers) -> list[int]:
    """Samples by the tenth of their length that is learned."""
    tenths = np.minimum(10 * supervised // np.maximum(1, lengths), 9)
    return np.bincount(tenths, minlength=10).tolist()


def counted(images: Numbers) -> dict[str, int]:
    """Samples by their number of images."""
    numbers, counts = np.unique(images, return_counts=True)
    return {str(number): int(count) for number, count in zip(numbers, counts, strict=True)}


def grid(sizes: Numbers) -> dict[str, Any]:
    """Images by width and height, four steps to a doubling; and the commonest sizes."""
    if not len(sizes):
        return {"edges": [], "counts": [], "commonest": []}
    low, high = np.floor(4 * np.log2(sizes.min())), np.floor(4 * np.log2(sizes.max())) + 1
    around = max(2, (WIDEST - (high - low)) // 2)  # a few sizes alone would fill the whole drawing
    edges = np.exp2(np.arange(max(0, low - around), high + around + 1) / 4)
    counts = np.histogram2d(sizes[:, 0], sizes[:, 1], (edges, edges))[0].astype(np.int64)
    found, numbers = np.unique(sizes, axis=0, return_counts=True)
    first = np.argsort(-numbers, kind="stable")[:COMMONEST]
    commonest = [[*map(int, found[at]), int(numbers[at])] for at in first]
    return {"edges": np.round(edges, 2).tolist(), "counts": counts.tolist(), "commonest": commonest}


def fill(lengths: Numbers, seq_length: int | None) -> dict[str, Any]:
    """Of each length of row the share that would hold tokens, and the share of samples that would be cut to it."""
    top = max(LONGEST_ROW, seq_length or 0)
    rows = sorted({*range(SHORTEST_ROW, top + 1, MULTIPLE), *([seq_length] if seq_length else [])})
    table = [fills(np.minimum(lengths, row), [row])[0] for row in rows]
    whole = [advice for advice in table if advice.seq_length >= lengths.max()]
    advised = best(whole or table)
    return {
        "seq_length": rows,
        "fill": [round(advice.fill, 4) for advice in table],
        "cut": [share((lengths > row).sum(), len(lengths)) for row in rows],
        "best": advised.seq_length,
        "chosen": seq_length,
    }


def examples(index: Index, number: int, shift: int = 0) -> dict[str, list[dict[str, Any]]]:
    """The longest and the shortest samples, read again."""
    order = np.argsort(index.length, kind="stable")
    chosen = {"longest": order[::-1][:number], "shortest": order[:number]}
    return {name: [example(index, int(sample), shift) for sample in samples] for name, samples in chosen.items()}


def example(index: Index, number: int, shift: int) -> dict[str, Any]:
    """One sample, or what is wrong with it by now."""
    told = {
        "number": number,
        "id": index.id(number),
        "where": index.where(number),
        "length": int(index.length[number]) - shift,
        "supervised": int(index.supervised[number]),
        "images": int(index.images[number]),
    }
    try:
        return {**told, "text": excerpt(index.sample(number))}
    except ValueError as error:
        return {**told, "text": f"({error})"}


def excerpt(sample: Sample) -> str:
    """The conversation in plain words, its middle left out where it is long."""
    text = "\n".join(
        f"{message.role}: " + "".join("[image]" if part is Mark.IMAGE else part for part in message.content).strip()
        for message in sample.messages
    )
    half = EXCERPT // 2
    return text if len(text) <= EXCERPT else f"{text[:half]} […] {text[-half:]}"
