"""Videos of a moving shape: what is drawn, that training learns the order of frames, and what the table asks."""

from __future__ import annotations

import json
import random
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, ImageSequence

sys.path.insert(0, str(Path(__file__).parents[1] / "data_scripts"))
sys.path.insert(0, str(Path(__file__).parents[1] / "recipes" / "tiny"))

import make_videos
import videos
from conftest import make_image_processor, make_model, make_tokenizer
from mllm.config import load_config
from mllm.data.formats.llava import read_llava
from mllm.data.processor import Processor
from mllm.evaluate.controls import blank_images
from mllm.evaluate.exact import evaluate
from mllm.generate import Assistant
from mllm.train.trainable import LearningRates, choose_trainable
from runs import run, settings
from shapes.motion import BACKWARDS, FRAMES

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("videos")
    make_videos.main(out, videos=4, held_out_videos=40)
    return out


def frames_of(path: Path) -> list[Image.Image]:
    with Image.open(path) as opened:
        return [frame.convert("RGB") for frame in ImageSequence.Iterator(opened)]


def centre(frame: Image.Image) -> tuple[float, float]:
    """Of what is not ground, whose colour is that of the corner."""
    pixels = torch.frombuffer(bytearray(frame.tobytes()), dtype=torch.uint8).view(64, 64, 3).int()
    y, x = ((pixels - pixels[0, 0]).abs().sum(2) > 60).nonzero(as_tuple=True)
    return float(x.float().mean()), float(y.float().mean())


def test_shape_moves_in_every_frame_to_the_side_that_the_answer_names(data: Path) -> None:
    records = [r for r in json.loads((data / "plain_videos.json").read_text()) if r["type"] == "way"]
    ways = set()
    for record in records:
        way = record["conversations"][1]["value"]
        centres = [centre(frame) for frame in frames_of(data / record["video"])]
        assert len(centres) == FRAMES
        axis, sign = {"left": (0, -1), "right": (0, 1), "top": (1, -1), "bottom": (1, 1)}[way]
        steps = [sign * (after[axis] - before[axis]) for before, after in pairwise(centres)]
        assert min(steps) > 1
        ways.add(way)
    assert ways == set(BACKWARDS)


def test_the_same_seed_draws_the_same_videos(data: Path, tmp_path: Path) -> None:
    make_videos.main(tmp_path, videos=3, held_out_videos=40)
    for name in ("plain_videos.json", "videos/train/00002.gif", "videos/plain/00039.gif"):
        assert (tmp_path / name).read_bytes() == (data / name).read_bytes()


def test_backwards_is_the_same_video_from_its_end_and_only_the_way_has_another_answer(data: Path) -> None:
    for sample in read_llava(data / "plain_videos.json")[:4]:
        turned = videos.backwards(sample)
        told, before = turned.messages[-1].text, sample.messages[-1].text
        assert told == (BACKWARDS[before] if sample.meta["type"] == "way" else before)
        shown: Any = turned.images[0].source  # type: ignore[union-attr]
        assert [frame.tobytes() for frame in shown] == [f.tobytes() for f in frames_of(Path(str(sample.images[0])))][
            ::-1
        ]


def lit(folder: Path, number: int, name: str) -> Path:
    """Videos of two frames, one dark and one light; the answer tells which comes first."""
    rng, records = random.Random(name), []
    for row in range(number):
        shades = sorted([rng.randint(0, 60), rng.randint(190, 255)], reverse=bool(row % 2))
        first, second = (Image.new("RGB", (32, 32), (shade,) * 3) for shade in shades)
        first.save(folder / f"{name}{row}.gif", save_all=True, append_images=[second], duration=100)
        told = [{"from": "human", "value": "<video>what?"}, {"from": "gpt", "value": "blue" if row % 2 else "red"}]
        records.append({"id": f"r{row}", "video": f"{name}{row}.gif", "type": "colour", "conversations": told})
    (folder / f"{name}.json").write_text(json.dumps(records))
    return folder / f"{name}.json"


def test_training_on_videos_learns_the_order_of_their_frames(tmp_path: Path) -> None:
    """Of videos that it never saw: played backwards each gets the other answer, grey ones all get the same."""
    processor = Processor(make_tokenizer(), make_image_processor(), 4, video_frames=2)
    rates, model = LearningRates(connector=1e-2, llm=1e-2), make_model()
    choose_trainable(model, rates, None)
    common = {"steps": 40, "rows_per_step": 8, "rows_per_micro_batch": 8, "warmup": 0.1}
    train = settings(tmp_path / "out", learning_rate=rates, probe=False, audit="off", log_every=40, **common)
    run(lit(tmp_path, 64, "train"), train, model, processor=processor)
    asked, assistant = read_llava(lit(tmp_path, 16, "held_out")), Assistant(model.eval(), processor)
    shown = {"right": asked, "backwards": [videos.backwards(s) for s in asked], "grey": blank_images(asked)}
    accuracy = {name: evaluate(assistant, samples)["accuracy"] for name, samples in shown.items()}
    assert accuracy["right"] >= 0.9
    assert accuracy["backwards"] <= 0.1
    assert accuracy["grey"] == 0.5


def test_recipe_trains_on_the_videos_that_the_script_draws() -> None:
    config = load_config(ROOT / "recipes/tiny/videos.yaml")
    assert config.data.video_frames == 4
    assert str(config.data.sources[0].path).endswith("train_videos.json")  # type: ignore[attr-defined]
    assert videos.MARK in (ROOT / "recipes/README.md").read_text()
