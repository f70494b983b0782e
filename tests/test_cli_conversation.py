"""The turns of `mllm chat`: what is said, shown, forgotten, saved; no model is needed for that."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from conftest import picture
from mllm import cli
from mllm.data.formats.messages import MessagesSource
from mllm.types import Mark, Message, Sample, Video


class Echo:
    """An assistant that says how many turns and images it was given."""

    def __init__(self) -> None:
        self.heard: list[Sample] = []

    def stream(self, sample: Sample, max_new_tokens: int) -> Iterator[str]:
        if any("missing" in str(image) for image in sample.images):
            raise ValueError("cannot read image missing.png")
        self.heard.append(copy.deepcopy(sample))  # the conversation goes on in the same lists
        yield from ("heard ", str(len(sample.messages)))


def talk(
    monkeypatch: Any, *lines: str | type[BaseException], images: list[str] | None = None, echo: Echo | None = None
) -> Echo:
    """Say these lines, then end the input."""
    said, echo = iter(lines), echo or Echo()

    def answer(_: str = "") -> str:
        line = next(said, EOFError)
        if isinstance(line, str):
            return line
        raise line

    monkeypatch.setattr("builtins.input", answer)
    cli.converse(echo, images or [], 8)  # type: ignore[arg-type]
    return echo


def test_conversation_keeps_its_turns_and_its_images(monkeypatch: Any, capsys: Any) -> None:
    heard = talk(monkeypatch, "/image a.png", "what?", "", "and then?", "/image b.png", "now?").heard
    assert [len(sample.messages) for sample in heard] == [1, 3, 5]
    assert [sample.images for sample in heard] == [["a.png"], ["a.png"], ["a.png", "b.png"]]
    assert [m.role for m in heard[2].messages] == ["user", "assistant", "user", "assistant", "user"]
    assert heard[2].messages[1].text == "heard 1"
    assert [m.num_images for m in heard[2].messages] == [1, 0, 0, 0, 1]
    assert "heard 5" in capsys.readouterr().out


def test_images_stand_in_front_of_the_question_in_order(monkeypatch: Any) -> None:
    (heard,) = talk(monkeypatch, "/image a.png", "/image b.png", "what?").heard
    assert heard.messages[0].content == [Mark.IMAGE, Mark.IMAGE, "\n", "what?"]
    assert heard.images == ["a.png", "b.png"]


def test_clear_forgets_turns_and_images(monkeypatch: Any) -> None:
    heard = talk(monkeypatch, "/image a.png", "what?", "/clear", "and now?").heard
    assert len(heard[1].messages) == 1
    assert heard[1].images == []


def test_clear_goes_back_to_the_images_of_the_command_line(monkeypatch: Any) -> None:
    heard = talk(monkeypatch, "one", "/clear", "two", images=["a.png"]).heard
    assert [sample.images for sample in heard] == [["a.png"], ["a.png"]]


@pytest.mark.parametrize("end", ["/exit", EOFError, KeyboardInterrupt])
def test_exit_end_of_input_and_ctrl_c_end_the_conversation(monkeypatch: Any, end: Any) -> None:
    assert len(talk(monkeypatch, "one", end, "never heard").heard) == 1


def test_bad_image_is_told_and_the_conversation_goes_on_without_it(monkeypatch: Any, capsys: Any) -> None:
    heard = talk(monkeypatch, "one", "/image missing.png", "two", "three").heard
    assert [len(sample.messages) for sample in heard] == [1, 3]
    assert heard[1].images == []
    assert "error: cannot read image missing.png" in capsys.readouterr().out


def test_system_words_stand_in_front_until_they_are_taken_back(monkeypatch: Any) -> None:
    heard = talk(monkeypatch, "/system be brief", "one", "/clear", "two", "/system", "three").heard
    assert [[m.role for m in sample.messages][:2] for sample in heard] == [
        ["system", "user"],
        ["system", "user"],
        ["user", "assistant"],
    ]
    assert heard[0].messages[0].text == "be brief"


def test_regen_asks_the_last_question_again(monkeypatch: Any, capsys: Any) -> None:
    heard = talk(monkeypatch, "/regen", "/image a.png", "one", "two", "/regen", "three").heard
    assert heard[2] == heard[1]
    assert [len(sample.messages) for sample in heard] == [1, 3, 3, 5]
    assert all(sample.images == ["a.png"] for sample in heard)
    assert "error: /regen before any question" in capsys.readouterr().out


def test_saved_conversation_is_one_that_training_reads(tmp_path: Path, monkeypatch: Any) -> None:
    file, image = tmp_path / "with a blank.json", tmp_path / "1.png"
    picture(1).save(image)
    echo = talk(monkeypatch, "/system be brief", f"/image {image}", "what?", "and why?", f"/save '{file}'")
    (read,) = MessagesSource(path=file).read()
    assert read.images == [image]
    assert read.messages[:4] == echo.heard[1].messages
    assert read.messages[4] == Message("assistant", ["heard 4"])


def test_saved_conversation_keeps_its_videos(tmp_path: Path, monkeypatch: Any) -> None:
    file, clip, image = tmp_path / "out.json", tmp_path / "a.mp4", tmp_path / "b.png"
    echo = talk(monkeypatch, f"/video {clip}", f"/image {image}", "what?", "/video", f"/save {file}")
    assert echo.heard[0].images == [Video(str(clip)), str(image)]
    (read,) = MessagesSource(path=file).read()
    assert read.images == [Video(clip), image]


def test_words_say_where_videos_and_images_stand() -> None:
    asked = cli.question([], "<image> or <video>?", ["a.png", Video("b.mp4")])
    assert asked.messages[0].content == [Mark.IMAGE, " or ", Mark.IMAGE, "?"]
    assert cli.question([], "<video> or <image>?", ["a.png", Video("b.mp4")]).images == [Video("b.mp4"), "a.png"]


def test_save_that_cannot_be_written_is_told(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    talk(monkeypatch, "one", f"/save {tmp_path}/nowhere/out.json", "/save", "/image")
    out = capsys.readouterr().out
    assert "nowhere/out.json" in out
    assert out.count("error: ") == 3


def test_unknown_command_is_not_asked(monkeypatch: Any, capsys: Any) -> None:
    assert len(talk(monkeypatch, "/imgae a.png", "/help", "/usr/bin is what?").heard) == 1
    out = capsys.readouterr().out
    assert "error: no command /imgae" in out
    assert "write the conversation as JSON" in out


def test_ctrl_c_ends_the_answer_and_not_the_conversation(monkeypatch: Any, capsys: Any) -> None:
    class Interrupted(Echo):
        def stream(self, sample: Sample, max_new_tokens: int) -> Iterator[str]:
            for piece in super().stream(sample, max_new_tokens):
                yield piece
                if len(self.heard) == 1:
                    raise KeyboardInterrupt

    heard = talk(monkeypatch, "one", "two", echo=Interrupted()).heard
    assert [m.text for m in heard[1].messages] == ["one", "heard", "two"]
