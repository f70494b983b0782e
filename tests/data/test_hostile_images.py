"""Broken, odd and hostile files: each is an image or one ValueError that names it, in little memory and time."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from shared_data import shared

MEMORY, SECONDS = 3 * 2**30, 100
READER = """
import json, pathlib, resource, sys
resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
from mllm.data.images import image_size, open_image
outcomes = {}
for path in sorted(pathlib.Path(sys.argv[1]).rglob("*")):
    if path.is_file():
        try:
            image = open_image(path)
            right = image.mode == "RGB" and image.size == image_size(path)
            outcomes[str(path)] = "" if right else f"{image.mode} {image.size}"
        except ValueError as error:
            outcomes[str(path)] = str(error)
print(json.dumps(outcomes))
"""


@pytest.fixture(scope="module")
def outcomes() -> dict[str, str]:
    """What becomes of each file in a process of its own: an empty string for an image, else the words of the error."""
    command = [
        sys.executable,
        "-W",
        "ignore",
        "-c",
        READER.replace("MEMORY", str(MEMORY)),
        str(shared("hostile-images")),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=True)
    return dict(json.loads(done.stdout))


def test_every_hostile_file_is_an_image_or_a_value_error_that_names_it(outcomes: dict[str, str]) -> None:
    assert len(outcomes) > 300
    unnamed = {path: said for path, said in outcomes.items() if said and f"cannot read image {path}: " not in said}
    assert not unnamed
    assert max(map(len, outcomes.values())) < 700


def test_what_pillow_alone_reads_is_read_here_and_nothing_else(outcomes: dict[str, str]) -> None:
    folder = shared("hostile-images")
    lines = (folder / "pillow-outcomes.tsv").read_text().splitlines()[1:]
    fine = {Path(name) for name, outcome, *_ in (line.split("\t") for line in lines) if outcome == "ok"}
    read = {Path(path).relative_to(folder) for path, said in outcomes.items() if not said}
    present = {Path(path).relative_to(folder) for path in outcomes}
    assert read == fine & present
