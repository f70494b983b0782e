"""Draw videos of one moving shape: animated GIFs of 8 frames, and questions about them.

Enters: a seed. Leaves, in `--out`: `videos/SPLIT/*.gif`, `train_videos.json` and `plain_videos.json` in LLaVA format (a
record a question, `<video>` in its words). Why: training and evaluation on videos, from files to a measured answer,
offline and in minutes; nothing is needed to decode them but Pillow.

    python data_scripts/make_videos.py --out runs/tiny/data
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import tyro
from rich.progress import track

from shapes.motion import ask_motion, draw_motion, film


def main(out: Path, videos: int = 1500, held_out_videos: int = 250, seed: int = 0) -> None:
    """Draw the videos.

    Args:
        out: The folder to write.
        videos: Training videos.
        held_out_videos: Videos of `plain_videos.json`.
        seed: The same seed, the same files.
    """
    for split, number in (("train", videos), ("plain", held_out_videos)):
        rng = random.Random(f"{seed}/{split} videos")
        records = [
            record for index in track(range(number), f"{split} videos") for record in draw(out, split, index, rng)
        ]
        (out / f"{split}_videos.json").write_text(json.dumps(records, indent=1))


def draw(out: Path, split: str, index: int, rng: random.Random) -> list[dict[str, Any]]:
    """Write one video; its questions."""
    motion = draw_motion(rng)
    path = f"videos/{split}/{index:05d}.gif"
    (out / path).parent.mkdir(parents=True, exist_ok=True)
    first, *others = film(motion, rng)
    first.save(out / path, save_all=True, append_images=others, duration=100, loop=0)
    return [
        {
            "id": f"{split}-video-{index:05d}-{number}",
            "video": path,
            "type": question.type,
            "conversations": [
                {"from": "human", "value": f"<video>\n{question.text}"},
                {"from": "gpt", "value": question.answer},
            ],
        }
        for number, question in enumerate(ask_motion(motion))
    ]


if __name__ == "__main__":
    tyro.cli(main)
