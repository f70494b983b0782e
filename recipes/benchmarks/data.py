"""The data engine measured: its loader, index and packer beside others, in one run.

Enters: how many samples to draw, how often to repeat. Leaves: one mapping of numbers. Ratios are of CPU time of this
one process (`clock`), so that they hold on a busy machine; rates are this machine's.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.clock import interleaved, rate, speed
from benchmarks.drawn import draw
from benchmarks.mixes import MIXES, mix
from benchmarks.packers import balanced_knapsack, first_fit_decreasing
from benchmarks.ways import counting, index_of, indexing, loader, plain, webdataset
from mllm.data.packing import pack
from mllm.data.plan import Plan


def measure(samples: int, repeats: int, lengths: int, tick: Callable[[str], None]) -> dict[str, Any]:
    """All numbers; `tick` is told what goes on."""
    torch.set_num_threads(1)
    tick("drawing")
    with tempfile.TemporaryDirectory() as folder:
        return {**measure_loading(Path(folder), samples, repeats, tick), **measure_packing(repeats, lengths, tick)}


def measure_loading(folder: Path, samples: int, repeats: int, tick: Callable[[str], None]) -> dict[str, Any]:
    data = draw(folder, samples)
    index, of_tars = (index_of(path, data.processor) for path in (data.json, data.shards[0].parent))
    loaders = {
        "loader": loader(index, data.processor),
        "plain loop": plain(data),
        "loader on tars": loader(of_tars, data.processor),
        "webdataset": webdataset(data),
    }
    indices = {"index": indexing(data), "plain count": counting(data)}
    seconds = interleaved(loaders, repeats, lambda: tick("loading"))
    seconds |= interleaved(indices, repeats, lambda: tick("indexing"))
    speeds = {
        "loader_vs_plain": speed(seconds["loader"], seconds["plain loop"]),
        "loader_vs_webdataset": speed(seconds["loader on tars"], seconds["webdataset"]),
        "index_vs_plain": speed(seconds["index"], seconds["plain count"]),
    }
    return {
        **{name: each["median"] for name, each in speeds.items()},
        "index_samples_per_s": rate(seconds["index"]),
        "samples_per_s": {name: rate(each) for name, each in seconds.items()},
        "ranges": {name: [each["least"], each["greatest"]] for name, each in speeds.items()},
        "samples": samples,
        "repeats": repeats,
        "bytes_per_image": data.image_bytes / samples,
        "tokens_per_sample": float(index.length.mean()),
    }


def measure_packing(repeats: int, number: int, tick: Callable[[str], None]) -> dict[str, Any]:
    """The rate of the slowest mix; for each, the share of its rows that is tokens, packed by us and by others."""
    rates: dict[str, float] = {}
    fills: dict[str, dict[str, float]] = {name: {} for name in PACKERS}
    for kind, row in MIXES:
        tick("packing")
        lengths, name = mix(kind, number), f"{kind.replace(' ', '-')}-{row}"
        packing = {"pack": lambda lengths=lengths, row=row: sum(map(len, pack(lengths, row)))}
        rates[name] = rate(interleaved(packing, repeats)["pack"])
        for way, rows_of in PACKERS.items():
            fills[way][name] = sum(lengths) / (rows_of(lengths, row) * row)
    return {"packer_samples_per_s": min(rates.values()), "packer_samples_per_s_of": rates, **fills}


def planned(lengths: list[int], row: int) -> int:
    """Rows of an epoch as the plan makes them, in windows of about 8,192 samples."""
    return len(Plan.from_lengths(lengths, row, rows_per_step=1).epoch(0))


PACKERS: dict[str, Callable[[list[int], int], int]] = {
    "fill": planned,
    "fill_first_fit_decreasing": first_fit_decreasing,
    "fill_balanced_knapsack": balanced_knapsack,
    "fill_balanced_knapsack_64_rows": partial(balanced_knapsack, window_rows=64),
}
"""Lengths and a row's length to the number of rows."""
