"""`mllm` as a person meets it: quick to answer, one line for a mistake, the same answers as the library."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from conftest import make_processor, picture, run_mllm, write_llava
from mllm import cli
from mllm.config import RunConfig, dump_config
from mllm.data.images import open_image
from mllm.generate import Assistant
from mllm.models.build import ModelConfig, build_model
from mllm.models.vision_encoder import VisionEncoder
from mllm.train.settings import TrainConfig
from mllm.train.stage_folder import save_stage
from mllm.types import Frame, Mark, Message, Sample, Video
from video_files import draw_gif, draw_video

HEAVY = ("torch", "transformers", "peft", "accelerate", "numpy", "PIL", "matplotlib")
SECONDS = 1.0


@pytest.fixture(scope="module")
def stage(hub: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished stage of the tiny parts."""
    folder, processor = tmp_path_factory.mktemp("stage"), make_processor()
    config = RunConfig(TrainConfig(output_dir=folder), model=ModelConfig(str(hub / "encoder"), str(hub / "llm")))
    save_stage(folder, build_model(config.parts(), processor.image_token_id), processor, dump_config(config))
    return folder


@pytest.fixture
def mllm(monkeypatch: pytest.MonkeyPatch, capsys: Any, tmp_path: Path) -> Callable[..., tuple[Any, str]]:
    """Run a command in this process, from an empty folder: exit code (or message) and what was printed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLLM_MODEL", raising=False)
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)

    def run(*arguments: object) -> tuple[Any, str]:
        return run_mllm(monkeypatch, *arguments), capsys.readouterr().out

    return run


def show(folder: Path, seed: int = 1) -> Path:
    picture(seed).save(folder / f"{seed}.png")
    return folder / f"{seed}.png"


# ---------------------------------------------------------------- quick


def cpu_seconds(*command: str) -> float:
    """Processor time of one run: wall time would measure who else is on the machine."""
    before = os.times()
    subprocess.run([sys.executable, *command], check=True, capture_output=True)
    after = os.times()
    return after.children_user + after.children_system - before.children_user - before.children_system


@pytest.mark.parametrize("command", [("-c", "import mllm"), ("-m", "mllm.cli", "--help")], ids=["import", "help"])
def test_import_and_help_take_less_than_a_second(command: tuple[str, ...]) -> None:
    assert min(cpu_seconds(*command) for _ in range(3)) < SECONDS


@pytest.mark.parametrize(
    "arguments", [["--help"], *([name, "--help"] for name in ("chat", "eval", "export", "info", "push"))], ids=" ".join
)
def test_help_loads_nothing_heavy(arguments: list[str]) -> None:
    program = (
        f"import sys; sys.argv = ['mllm', *{arguments}]\nimport mllm.cli\n"
        "try: mllm.cli.main()\nexcept SystemExit: pass\n"
        f"print('loaded:', [name for name in {HEAVY} if name in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert out.splitlines()[-1] == "loaded: []"


def test_help_names_every_command_and_every_flag_has_its_words(mllm) -> None:
    code, text = mllm("--help")
    assert code == 0
    assert "chat" in text
    assert "eval" in text
    for command, flags in {"chat": ["--image", "--prompt", "--json"], "eval": ["--data", "--shuffle-images"]}.items():
        code, text = mllm(command, "--help")
        assert code == 0
        assert all(flag in text for flag in flags)
    assert "LLaVA-JSON file; each assistant turn" in " ".join(text.replace("│", " ").split())
    assert "Args:" not in text


# ---------------------------------------------------------------- which model


def test_version_is_that_of_the_package(mllm) -> None:
    assert mllm("--version") == (0, f"mllm {version('mllm')}\n")


def test_module_is_the_command() -> None:
    done = subprocess.run([sys.executable, "-m", "mllm", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"mllm {version('mllm')}\n"


def test_without_any_model_one_line_says_how_to_get_one(mllm) -> None:
    code, _ = mllm("chat", "--prompt", "hi")
    assert code.startswith("error: no model")
    assert len(code.splitlines()) == 1
    for way in ("make demo", "--model", "MLLM_MODEL"):
        assert way in code


@pytest.mark.parametrize("name", ["nowhere", "/nowhere/at/all", "no/such-model"])
@pytest.mark.parametrize("command", [["chat", "--prompt", "hi", "--model"], ["eval", "--data", "x.json"]])
def test_model_that_is_not_there_is_one_line_that_names_it(mllm, tmp_path: Path, command: list[str], name: str) -> None:
    write_llava(tmp_path).rename(tmp_path / "x.json")
    code, _ = mllm(*command, name)
    assert code.startswith("error: no such model")
    assert name in code
    assert len(code.splitlines()) == 1


def test_folder_that_is_no_stage_is_named(mllm, tmp_path: Path) -> None:
    code, _ = mllm("chat", "--prompt", "hi", "--model", tmp_path)
    assert f"{tmp_path} is no stage folder" in code


@pytest.mark.parametrize("deep", [True, False])
def test_stage_with_relative_parts_answers_from_any_folder(
    mllm, hub: Path, tmp_path: Path, monkeypatch: Any, deep: bool
) -> None:
    """`parts/llm` could be a Hub id, `runs/parts/llm` not; the second is found from wherever the stage was moved."""
    start, parts = tmp_path / "start", Path("runs/parts" if deep else "parts")
    parts_there = start / parts
    parts_there.mkdir(parents=True)
    for name in ("encoder", "llm"):
        (parts_there / name).symlink_to(hub / name)
    monkeypatch.chdir(start)
    folder, processor = Path("runs/stage"), make_processor()
    folder.mkdir(parents=True)
    config = RunConfig(TrainConfig(output_dir=folder), model=ModelConfig(f"{parts}/encoder", f"{parts}/llm"))
    save_stage(folder, build_model(config.parts(), processor.image_token_id), processor, dump_config(config))
    ask = ["chat", "--prompt", "hi", "--max-new-tokens", 3, "--model"]
    here = mllm(*ask, folder)
    assert here[0] == 0
    monkeypatch.chdir(tmp_path)
    assert mllm(*ask, start / folder) == here
    (start / folder).rename(start / "runs/moved")
    moved = mllm(*ask, start / "runs/moved")
    assert moved == here if deep else "no vision encoder at 'parts/encoder'" in moved[0]


def test_full_disk_is_one_line(mllm, stage: Path, monkeypatch: Any) -> None:
    from safetensors import SafetensorError

    def full(*_: Any) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("mllm.export.export", full)
    code, _ = mllm("export", stage)
    assert code.startswith("error: the disk takes no more: ")


def test_flag_wins_over_environment_and_environment_over_newest_run(monkeypatch: Any, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "a" / "instruct").mkdir(parents=True)
    (tmp_path / "runs" / "a" / "instruct" / "connector.safetensors").touch()
    monkeypatch.delenv("MLLM_MODEL", raising=False)
    assert cli.choose_model("") == str(Path("runs/a/instruct"))
    monkeypatch.setenv("MLLM_MODEL", "from/environment")
    assert cli.choose_model("") == "from/environment"
    assert cli.choose_model("flag") == "flag"


# ---------------------------------------------------------------- one question


def test_one_question_as_json_is_the_answer_of_the_library(mllm, stage: Path, tmp_path: Path) -> None:
    image = show(tmp_path)
    flags = ["--model", stage, "--image", image, "--prompt", "what is it?", "--max-new-tokens", "6", "--json"]
    code, text = mllm("chat", *flags)
    told = json.loads(text)
    assert code == 0
    assert (told["prompt"], told["image"], told["model"]) == ("what is it?", [str(image)], str(stage))
    asked = cli.question([], "what is it?", [str(image)])
    assert told["answer"] == Assistant.load(stage).answer([asked], 6)[0]


def test_one_question_in_words_prints_the_answer_alone(mllm, stage: Path) -> None:
    code, text = mllm("chat", "--model", stage, "--prompt", "hi", "--max-new-tokens", "6")
    assert code == 0
    assert text.strip() == Assistant.load(stage).answer([cli.question([], "hi", [])], 6)[0]


@pytest.mark.parametrize("times", [2, 3])
def test_image_may_be_given_more_than_once(mllm, stage: Path, tmp_path: Path, times: int) -> None:
    images = [argument for i in range(times) for argument in ("--image", show(tmp_path, i))]
    code, text = mllm("chat", "--model", stage, *images, "--prompt", "hi", "--json", "--max-new-tokens", "2")
    assert code == 0
    assert len(json.loads(text)["image"]) == times


@pytest.mark.parametrize("name", ["clip.mp4", "clip.gif"])
def test_video_is_asked_about_as_its_frames(mllm, stage: Path, tmp_path: Path, name: str) -> None:
    clip = (draw_video if name.endswith("mp4") else draw_gif)(tmp_path / name, 12)
    flags = ["--model", stage, "--video", clip, "--prompt", "what?", "--max-new-tokens", "6", "--json"]
    code, text = mllm("chat", *flags)
    told, assistant = json.loads(text), Assistant.load(stage)
    assert (code, told["video"], told["image"]) == (0, [str(clip)], [])
    frames = [open_image(Frame(Video(clip), number, 8)) for number in range(8)]
    asked = Sample("q", [Message("user", [*[Mark.IMAGE] * 8, "\n", "what?"])], list(frames))
    assert told["answer"] == "".join(assistant.stream(asked, 6)).strip()
    assert told["answer"] == assistant.answer([cli.question([], "what?", [Video(str(clip))])], 6)[0]


def test_video_that_cannot_be_read_is_one_line_that_names_it(mllm, stage: Path, tmp_path: Path) -> None:
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    for name in ("broken.mp4", "missing.mp4"):
        code, _ = mllm("chat", "--model", stage, "--video", tmp_path / name, "--prompt", "hi")
        assert code.startswith("error: cannot read video")
        assert name in code
        assert len(code.splitlines()) == 1


@pytest.mark.parametrize("broken", ["missing.png", "broken.png", "empty.png"])
def test_image_that_cannot_be_read_is_one_line_that_names_it(mllm, stage: Path, tmp_path: Path, broken: str) -> None:
    (tmp_path / "broken.png").write_bytes(show(tmp_path).read_bytes()[:60])
    (tmp_path / "empty.png").touch()
    code, _ = mllm("chat", "--model", stage, "--image", tmp_path / broken, "--prompt", "hi")
    assert code.startswith("error: ")
    assert broken in code
    assert len(code.splitlines()) == 1


def test_piped_text_is_one_question(stage: Path) -> None:
    """In a process of its own: standard input is a pipe there."""
    command = [sys.executable, "-m", "mllm.cli", "chat", "--model", str(stage), "--json", "--max-new-tokens", "2"]
    done = subprocess.run(command, input="what is it?\n", capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["prompt"] == "what is it?"
    assert done.stderr == ""


def test_mistake_in_a_process_of_its_own_is_one_line_without_a_traceback(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mllm.cli", "chat", "--prompt", "hi"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, stdin=subprocess.DEVNULL)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: no model")


# ---------------------------------------------------------------- a conversation with a model


def test_ctrl_c_while_the_model_computes_ends_the_answer_alone(
    mllm, stage: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    """Wherever it strikes: here in the encoder, before the first token."""
    said, strikes = iter([f"/image {show(tmp_path)}", "what is it?", "and now?", "/exit"]), [1]
    forward = VisionEncoder.forward

    def interrupted(*arguments: Any) -> Any:
        if strikes:
            strikes.pop()
            raise KeyboardInterrupt
        return forward(*arguments)

    monkeypatch.setattr("builtins.input", lambda _="": next(said))
    monkeypatch.setattr(VisionEncoder, "forward", interrupted)
    assert mllm("chat", "--model", stage, "--max-new-tokens", "3")[0] == 0
    assert next(said, None) is None


@pytest.mark.parametrize("flag", ["--compile", "--no-compile"])
@pytest.mark.parametrize("ask", ["-p", "--prompt"])
def test_compiling_changes_no_answer(mllm, stage: Path, flag: str, ask: str) -> None:
    code, text = mllm("chat", "--model", stage, ask, "hi", "--max-new-tokens", "6", flag)
    assert (code, text.strip()) == (0, Assistant.load(stage).answer([cli.question([], "hi", [])], 6)[0])


def test_conversation_with_a_real_model(mllm, stage: Path, tmp_path: Path, monkeypatch: Any) -> None:
    said = iter([f"/image {show(tmp_path)}", "what is it?", "and now?", "/image nowhere.png", "so?", "/exit"])
    monkeypatch.setattr("builtins.input", lambda _="": next(said))
    code, text = mllm("chat", "--model", stage, "--max-new-tokens", "3")
    assert code == 0
    assert "error: cannot read image nowhere.png" in text


# ---------------------------------------------------------------- eval


@pytest.mark.parametrize("control", [None, "--shuffle-images", "--blank-images", "--history"])
def test_eval_writes_accuracy_and_every_answer(mllm, stage: Path, tmp_path: Path, control: str | None) -> None:
    data = write_llava(tmp_path / "data", records=3)
    flags = [flag for flag in (control,) if flag]
    code, _ = mllm("eval", stage, "--data", data, "--json", "out.json", "--max-new-tokens", "3", *flags)
    told = json.loads((tmp_path / "out.json").read_text())
    assert code == 0
    assert told["number"] == len(told["answers"]) == 6
    assert told["accuracy"] == told["correct"] / 6


def test_two_controls_at_once_are_refused(mllm, stage: Path, tmp_path: Path) -> None:
    code, _ = mllm("eval", stage, "--data", write_llava(tmp_path), "--shuffle-images", "--blank-images")
    assert "one at a time" in code


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--batch-size", "0"], "--batch-size 0"),
        (["--max-new-tokens", "0"], "--max-new-tokens 0"),
        (["--json", "."], "--json . is a folder"),
        (["--json", "data/data.json/deep/out.json"], "data.json is a file"),
    ],
    ids=str,
)
def test_what_eval_could_not_do_at_its_end_is_told_before_the_model_is_loaded(
    mllm, tmp_path: Path, flags: list[str], told: str
) -> None:
    data = write_llava(tmp_path / "data", records=1)
    code, _ = mllm("eval", "no/model", "--data", data.relative_to(tmp_path), *flags)
    assert code.startswith("error: ")
    assert told in code


def test_eval_names_the_record_whose_image_is_missing_before_the_model_is_loaded(mllm, tmp_path: Path) -> None:
    data = write_llava(tmp_path / "data", records=3)
    (tmp_path / "data/images/1.png").unlink()
    code, _ = mllm("eval", "no/model", "--data", data)
    assert "row 1: cannot read image" in code
    assert "no such file" in code
    assert "--image-dir" in code


def test_eval_without_its_file_names_it(mllm, stage: Path) -> None:
    code, _ = mllm("eval", stage, "--data", "nowhere.json")
    assert code.startswith("error: ")
    assert "nowhere.json" in code
