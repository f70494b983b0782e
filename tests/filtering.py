"""A run of `data_scripts/filter.py` in this process, and small data sets for it to filter."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

from PIL import Image

from conftest import picture
from mllm.data.curation.filters.rules import Rules
from scripts import FOLDER, load_script

SCRIPT = FOLDER / "filter.py"
Lines = list[dict[str, Any]]

script = load_script("filter")


def lines(path: Path) -> Lines:
    return [json.loads(line) for line in path.read_text().splitlines()]


def run(path: Path, out: Path, rules: Rules | None = None, **options: Any) -> dict[str, str]:
    """The rule that removed each sample that is not kept."""
    script.main(str(path), out, rules or Rules(), workers=0, **options)
    return {line["id"]: line["rule"] for line in lines(out / "removed.jsonl")}


def write(folder: Path, records: Lines, name: str = "data.jsonl") -> Path:
    path = folder / name
    texts = [json.dumps(record) for record in records]
    path.write_text("[" + ",\n ".join(texts) + "]" if path.suffix == ".json" else "\n".join(texts) + "\n")
    return path


def caption(name: str, words: str = "a red circle", **more: Any) -> dict[str, Any]:
    return {"id": name, "image": f"{name}.png", "caption": words, **more}


def pictures(folder: Path, **images: Image.Image) -> Path:
    """A data set of these pictures, in this order."""
    for name, image in images.items():
        image.save(folder / f"{name}.png")
    return write(folder, [caption(name) for name in images])


def painting(seed: int, size: tuple[int, int] = (120, 90)) -> Image.Image:
    """Soft blots, since noise has no look that survives resizing."""
    return picture(seed, (9, 7)).resize(size, Image.Resampling.BICUBIC)


def jpeg(image: Image.Image, quality: int) -> Image.Image:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return Image.open(io.BytesIO(file.getvalue()))
