"""The pictures of a benchmark, which nobody may learn from who wants to be measured by it.

Enters: folders of images. Leaves: the name and the look of each. An image that cannot be read is an error: a check
with holes in it would promise what it does not keep.
"""

from __future__ import annotations

from pathlib import Path

from mllm.data.crew import Tick, run_jobs
from mllm.data.curation.filters.look import Looks, look, stacked
from mllm.data.curation.filters.measure import DRAFT
from mllm.data.images import open_image

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".avif", ".jp2"}
JOB = 64
"""Images of one job."""


def read_benchmark(folders: list[Path], workers: int) -> tuple[list[str], Looks]:
    """Names and looks of all images in the folders.

    Raises:
        ValueError: a folder holds none, or one that cannot be read.
    """
    names = [name for folder in folders for name in images_in(folder)]
    jobs = [names[start : start + JOB] for start in range(0, len(names), JOB)]
    found = dict(run_jobs(looks_of, jobs, workers, "benchmark", len(names), "images"))
    return names, stacked([each for number in range(len(jobs)) for each in found[number]])


def images_in(folder: Path) -> list[str]:
    names = sorted(str(path) for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    if not names:
        raise ValueError(f"--benchmark {folder} holds no images: give the folder of the benchmark's image files")
    return names


def looks_of(names: list[str], tick: Tick) -> list[bytes]:
    found = []
    for name in names:
        found.append(look(open_image(name, DRAFT)))
        tick(1, 1)
    return found
