"""What was exported answers `mllm chat` and `mllm eval` as the stage does that it was made of."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import picture, write_llava
from export.stages import make_parts, make_stage
from mllm import cli
from mllm.export.trained import load
from mllm.export.transformers_folder import write_files
from mllm.generate import Assistant
from mllm.models.connectors import MLPConnector, PixelShuffleConnector
from mllm.stock import StockAssistant, as_parts, is_stock, load_assistant
from mllm.types import Mark, Message, Sample, Video

STOCK = {"LlavaForConditionalGeneration": MLPConnector(), "MllmForConditionalGeneration": PixelShuffleConnector()}


@pytest.fixture(scope="module", params=STOCK)
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A stage, and the folder that was exported of it."""
    folder = tmp_path_factory.mktemp("stock")
    make_parts(folder, "siglip", llm="qwen2")
    stage = make_stage(folder, STOCK[request.param], lora=True)
    write_files(load(str(stage)), folder / "out", torch.float32)
    assert json.loads((folder / "out/config.json").read_text())["architectures"] == [request.param]
    return stage, folder / "out"


def conversations() -> list[Sample]:
    """Words alone; a picture; a second turn with a picture of its own, behind a system's words."""
    shown = [Message("user", [Mark.IMAGE, "\n", "What is this?"])]
    later = [Message("system", ["be brief"]), *shown, Message("assistant", ["red"])]
    return [
        Sample("words", [Message("user", ["How many?"])]),
        Sample("one", shown, [picture(1)]),
        Sample("two", [*later, Message("user", [Mark.IMAGE, "\n", "And this?"])], [picture(2), picture(3)]),
    ]


def test_exported_folder_answers_as_its_stage(exported: tuple[Path, Path]) -> None:
    ours, theirs = Assistant.load(exported[0], "cpu"), load_assistant(str(exported[1]))
    assert isinstance(theirs, StockAssistant)
    asked = conversations()
    assert theirs.answer(asked, 8) == [ours.answer([sample], 8)[0] for sample in asked]
    assert ["".join(theirs.stream(sample, 8)).strip() for sample in asked] == theirs.answer(asked, 8)
    assert len(set(theirs.answer(asked, 8))) > 1


def test_chat_and_eval_take_an_exported_folder(
    exported: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    data = write_llava(tmp_path, records=2)
    found = []
    for model in exported:
        said = []
        for flags in (
            ["eval", model, "--data", data, "--max-new-tokens", 3, "--json", tmp_path / "told.json"],
            ["chat", "--model", model, "--image", tmp_path / "images/1.png", "-p", "what?", "--max-new-tokens", 3],
        ):
            monkeypatch.setattr(sys, "argv", ["mllm", *map(str, flags)])
            cli.main()
            said.append(capsys.readouterr().out)
        found.append((json.loads((tmp_path / "told.json").read_text()), said[1]))
    assert found[0] == found[1]


def test_stages_and_plain_llms_are_not_stock(exported: tuple[Path, Path]) -> None:
    stage, out = exported
    assert is_stock(out)
    assert not is_stock(stage)
    assert not is_stock(stage.parent / "llm")
    with pytest.raises(ValueError, match="no stage folder"):
        load_assistant(str(stage.parent / "llm"))


def test_places_and_images_must_agree_and_videos_are_refused() -> None:
    with pytest.raises(ValueError, match="your question: 1 <image> placeholders, 0 images"):
        as_parts(Sample("chat", [Message("user", [Mark.IMAGE])], where="your question"))
    with pytest.raises(ValueError, match="videos need the stage folder"):
        as_parts(Sample("chat", [Message("user", [Mark.IMAGE])], [Video("a.mp4")]))


def test_exported_folder_that_is_not_whole_is_one_named_error(exported: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((exported[1] / "config.json").read_text())
    with pytest.raises(ValueError, match=str(tmp_path)):
        load_assistant(str(tmp_path))
