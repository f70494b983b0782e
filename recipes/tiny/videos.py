"""Ask the video model, and ask it again with the videos backwards, shuffled and grey.

Enters: a stage trained by `videos.yaml`, and `plain_videos.json`. Leaves: a row a way of showing them, printed and
between two marks of `recipes/README.md`. Why: played backwards, a shape goes the other way and keeps its colour. A
model that takes the frames in their order follows it; one that sees a bag of frames answers as before.

    python recipes/tiny/videos.py --model runs/tiny/videos
"""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "data_scripts"))

import tyro
from PIL import Image, ImageSequence

from connectors import README, put_between
from demo import ENVIRONMENT, HOME, SHUFFLE_SEED
from mllm.data.formats.llava import read_llava
from mllm.evaluate.controls import blank_images, shuffle_images
from mllm.evaluate.exact import Result, evaluate
from mllm.types import Message, Sample, Video
from shapes.motion import BACKWARDS

MARK = "tiny-videos"


def main(model: Path = HOME / "videos", data: Path = HOME / "data") -> None:
    """Ask every held-out question once in each way of showing its video.

    Args:
        model: The trained stage.
        data: The folder by `make_videos.py`.
    """
    os.environ.update(ENVIRONMENT)
    from mllm.generate import Assistant

    assistant = Assistant.load(model)
    samples = read_llava(data / "plain_videos.json")
    shown = {
        "as they are": samples,
        "backwards, the other way being right": [backwards(sample) for sample in samples],
        "of another question": shuffle_images(samples, SHUFFLE_SEED),
        "grey": blank_images(samples),
    }
    written = table({name: evaluate(assistant, own) for name, own in shown.items()})
    print(written)
    README.write_text(put_between(README.read_text(), written, MARK))


def backwards(sample: Sample) -> Sample:
    """The same question about the video played backwards, with the answer that is then right."""
    (video,) = sample.images
    with Image.open(str(video)) as opened:
        frames = [frame.convert("RGB") for frame in ImageSequence.Iterator(opened)]
    *asked, answer = sample.messages
    answer = Message("assistant", [BACKWARDS[answer.text]]) if sample.meta["type"] == "way" else answer
    return replace(sample, images=[Video(tuple(reversed(frames)))], messages=[*asked, answer])


def table(results: dict[str, Result]) -> str:
    """Markdown, a row a way of showing the videos."""
    types = sorted(next(iter(results.values()))["by_type"])
    rows = [["videos", *types], ["---"] * (1 + len(types))]
    for name, result in results.items():
        scores = [result["by_type"][type_] for type_ in types]
        rows.append([name, *[f"{score['accuracy']:.1%} of {score['number']}".replace("%", " %") for score in scores]])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


if __name__ == "__main__":
    tyro.cli(main)
