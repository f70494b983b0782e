"""The real scripts through `accelerate launch`: two stages, their folders, and a user's mistakes in words."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from conftest import make_clip, make_llm, make_processor, make_tokenizer, picture, write_llava
from killing import Forked
from mllm import stage as rooms
from mllm.config import RunConfig, dump_config, load_config
from mllm.generate import Assistant
from mllm.models.build import ModelConfig, build_model
from mllm.train.settings import TrainConfig
from mllm.train.stage_folder import save_stage
from mllm.types import Mark, Message, Sample
from recipe_runs import LAUNCH, ROOT, in_process, launch, lines, write_config
from runs import on_two_ranks

LLAVA15 = sorted((ROOT / "recipes" / "llava15").glob("*.yaml"))

pytestmark = pytest.mark.recipe


def test_one_command_trains_under_deepspeed_on_two_processes(
    hub: Path, llava_folder: Callable[..., Path], tmp_path: Path
) -> None:
    pytest.importorskip("deepspeed", reason="deepspeed is not installed: pip install 'mllm[deepspeed]'")
    config = write_config(tmp_path, hub, llava_folder(8), "align", save_every=2)
    engine = "deepspeed_configs/accelerate_cpu_zero2.yaml"
    command = [*LAUNCH[:3], "--config_file", engine, "recipes/pretrain.py", "--config", str(config)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert "ranks: 2, on cpu, DeepSpeed ZeRO stage 2" in done.stdout
    assert in_process("pretrain", "--config", config, "--train.output_dir", tmp_path / "one") == 0
    losses = [
        [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
        for folder in (tmp_path / "align", tmp_path / "one")
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def pretrained(config: Path, said: Path) -> int:
    """In a forked process that has the screen and the devices of `launch`: what it exits with."""
    os.environ.update(COLUMNS="200", ACCELERATE_USE_CPU="true")
    with said.open("w") as file, contextlib.redirect_stdout(file):
        return in_process("pretrain", "--config", config)


@pytest.fixture(scope="module")
def trained(hub: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`align/` by the real script, `instruct/` (LoRA) by the real command."""
    folder = tmp_path_factory.mktemp("trained")
    data = write_llava(folder)
    config = write_config(folder, hub, data, "align", save_every=2)
    align = Forked(lambda: sys.exit(pretrained(config, folder / "said.txt")), folder / "wrong.txt")
    assert align.wait() == 0, (folder / "wrong.txt").read_text()
    more = {"learning_rate": {"connector": 1e-3, "llm": 1e-2}, "lora": {"rank": 4, "alpha": 8}}
    instruct = launch("finetune", "--config", write_config(folder, hub, data, "instruct", **more), "--train.steps", 4)
    assert instruct.returncode == 0, instruct.stderr[-3000:]
    return folder


def test_two_stages_leave_whole_folders_and_finite_losses(trained: Path) -> None:
    for stage, steps, more in (("align", 3, {"checkpoints"}), ("instruct", 4, {"adapter"})):
        names = {path.name for path in (trained / stage).iterdir()}
        assert names == {
            "config.yaml",
            "config.json",
            "connector.safetensors",
            "processor",
            "metrics.jsonl",
            "loss.png",
            "ledger.json",
            "audit.json",
            *more,
        }
        assert [line["step"] for line in lines(trained / stage)] == list(range(1, steps + 1))
        assert all(torch.isfinite(torch.tensor(line["loss"])) for line in lines(trained / stage))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_run_that_is_told_to_go_while_it_writes_its_stage_ends_whole(
    hub: Path, llava_folder: Callable[..., Path], tmp_path: Path, number: signal.Signals
) -> None:
    config = write_config(tmp_path, hub, llava_folder(8), "align")

    def told(*arguments: Any) -> None:
        os.kill(os.getpid(), number)
        save_stage(*arguments)
        os.kill(os.getpid(), number)
        # what the audit starts is in the group that a scheduler signals
        assert subprocess.run(["sh", "-c", f"kill -{number.value} $$"], check=False).returncode == 0

    def begin() -> None:
        rooms.save_stage = told  # type: ignore[assignment]  # in a forked process, which ends
        sys.exit(in_process("pretrain", "--config", config))

    code = Forked(begin, tmp_path / "said").wait()
    assert code == 0, (tmp_path / "said").read_text()
    assert (tmp_path / "align" / "connector.safetensors").is_file()
    assert json.loads((tmp_path / "align" / "audit.json").read_text())["ok"]


def test_stage_config_is_the_merged_one_and_loads_again(trained: Path) -> None:
    config = load_config(trained / "instruct" / "config.yaml")
    assert config.train.steps == 4  # the flag, over the YAML's 3
    assert config.model is not None


def test_screen_shows_what_trains_and_a_sample(trained: Path) -> None:
    text = (trained / "said.txt").read_text()
    for words in ("what trains", "supervised in green", "learning rate", "finished"):
        assert words in text


def test_trained_stage_answers(trained: Path) -> None:
    assistant = Assistant.load(trained / "instruct")
    sample = Sample("x", [Message("user", ["what is it?"])])
    assert isinstance(assistant.answer([sample], 4)[0], str)
    assert "lora_" in str(list(dict(assistant.model.llm.named_parameters())))


def test_processor_of_a_stage_is_the_one_of_the_parts(trained: Path) -> None:
    saved, made = Assistant.load(trained / "align").processor, make_processor()
    assert saved.image_token_id == made.image_token_id
    assert saved.num_visual_tokens == made.num_visual_tokens


def test_two_processes_write_the_same_losses_as_one(trained: Path, hub: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path, hub, trained / "data.json", "align", save_every=2)
    on_two_ranks(on_rank, config, tmp_path)
    said = [(tmp_path / f"rank-{rank}.txt").read_text() for rank in (0, 1)]
    assert "ranks: 2, on cpu" in said[0]
    told = [[line["loss"] for line in lines(folder / "align")] for folder in (trained, tmp_path)]
    assert told[0] == pytest.approx(told[1], rel=1e-5)
    assert "".join(said).count("what trains") == 1  # only rank 0 speaks


def on_rank(rank: int, config: Path, folder: Path) -> None:
    """The script, as a launcher starts it on one of two gloo ranks."""
    assert pretrained(config, folder / f"rank-{rank}.txt") == 0


# ---------------------------------------------------------------- a user's mistakes


def broken(data: Path, kind: str) -> Path:
    image = data.parent / "images" / "3.png"
    if kind == "missing":
        image.unlink()
    elif kind == "no image at all":
        image.write_text("words")
    else:
        image.write_bytes(image.read_bytes()[:300])
    return data


@pytest.mark.parametrize("kind", ["missing", "no image at all", "truncated"])
def test_unreadable_image_is_told_with_its_file_and_row(hub: Path, tmp_path: Path, capsys: Any, kind: str) -> None:
    config = write_config(tmp_path, hub, broken(write_llava(tmp_path), kind), "align", steps=4, rows_per_step=4)
    assert in_process("pretrain", "--config", config) == 2
    said = capsys.readouterr().err
    assert "data.json, row 3" in said
    assert "3.png" in said
    assert "max_bad_share" in said


def test_allowed_share_of_bad_records_trains_and_names_them(hub: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path, hub, broken(write_llava(tmp_path), "missing"), "align")
    assert in_process("pretrain", "--config", config, "--data.max_bad_share", "0.2") == 0
    (line,) = (tmp_path / "align" / "quarantine.jsonl").read_text().splitlines()
    fault = json.loads(line)
    assert fault["where"].endswith("data.json, row 3")
    assert (fault["id"], fault["kind"]) == ("r3", "image")


MISTAKES = {
    "no data file": (["--data.sources.0.path", "nowhere.json"], "nowhere.json"),
    "no encoder": (["--model.vision_encoder", "no/encoder"], "no/encoder"),
    "no llm": (["--model.llm", "no/llm"], "no/llm"),
    "layer out of range": (["--model.feature_layer", "9"], "feature_layer 9"),
    "rows too short": (["--data.seq_length", "8"], "seq_length"),
    "rows do not divide": (["--train.rows_per_micro_batch", "3"], "rows_per_step 2"),
    "zero rows": (["--train.rows_per_step", "0"], "rows_per_step"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistake_ends_the_run_in_words_before_anything_is_written(hub, tmp_path, capsys, mistake: str) -> None:
    flags, said = MISTAKES[mistake]
    config = write_config(tmp_path, hub, write_llava(tmp_path), "align")
    assert in_process("pretrain", "--config", config, *flags) != 0
    captured = capsys.readouterr()
    assert said in captured.err + captured.out
    assert not (tmp_path / "align").exists()


def test_mistake_is_told_once_without_a_traceback(hub: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path, hub, write_llava(tmp_path), "align")
    done = launch("pretrain", "--config", config, "--model.llm", "no/llm")
    assert done.returncode != 0
    assert sum(line.startswith("error: ") for line in done.stderr.splitlines()) == 1
    assert "site-packages/transformers" not in done.stderr


# ---------------------------------------------------------------- LLaVA-1.5 at tiny sizes


@pytest.fixture(scope="module")
def qwen(hub: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """CLIP and Qwen2, the classes that the recipe names, and a stage that was aligned with them."""
    folder = tmp_path_factory.mktemp("qwen")
    make_clip().save_pretrained(folder / "encoder")
    make_processor().image_processor.save_pretrained(folder / "encoder")
    make_llm("qwen2").save_pretrained(folder / "llm")
    make_tokenizer().save_pretrained(folder / "llm")
    parts = ModelConfig(str(folder / "encoder"), str(folder / "llm"), dtype="bfloat16")
    config, processor = RunConfig(TrainConfig(output_dir=folder / "align"), model=parts), make_processor()
    (folder / "align").mkdir()
    save_stage(folder / "align", build_model(parts, processor.image_token_id), processor, dump_config(config))
    return folder


@pytest.mark.parametrize("path", LLAVA15, ids=lambda path: path.stem)
def test_llava15_dry_run(qwen: Path, tmp_path: Path, capsys: Any, path: Path) -> None:
    data = write_llava(tmp_path, turns=1)
    flags: list[object] = ["--data.sources.0.path", data, "--data.sources.0.image_dir", tmp_path, "--dry_run"]
    flags += ["--train.output_dir", tmp_path / "out"]
    if load_config(path).model:
        flags += ["--model.vision_encoder", qwen / "encoder", "--model.llm", qwen / "llm"]
    else:
        flags += ["--init_from", qwen / "align"]
    script = "pretrain" if load_config(path).model else "finetune"
    assert in_process(script, "--config", path, *flags) == 0
    text = capsys.readouterr().out
    assert "what trains" in text
    assert "supervised in green" in text
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("path", LLAVA15, ids=lambda path: path.stem)
def test_llava15_trains_two_steps(qwen: Path, tmp_path: Path, path: Path) -> None:
    """bfloat16 frozen weights, autocast, checkpointing, LoRA dropout: the options of the real recipe together."""
    data = write_llava(tmp_path, turns=1)
    flags: list[object] = ["--data.sources.0.path", data, "--data.sources.0.image_dir", tmp_path, "--train.steps", 2]
    flags += ["--train.output_dir", tmp_path / "out", "--train.rows_per_step", 2, "--data.num_workers", 0]
    flags += ["--data.seq_length", 96, "--train.save_every", 1]
    if load_config(path).model:
        flags += ["--model.vision_encoder", qwen / "encoder", "--model.llm", qwen / "llm"]
    else:
        flags += ["--init_from", qwen / "align"]
    assert in_process("pretrain" if load_config(path).model else "finetune", "--config", path, *flags) == 0
    assert all(0 < line["loss"] < 10 for line in lines(tmp_path / "out"))
    Assistant.load(tmp_path / "out")


def test_accumulation_named_to_the_launcher_does_not_divide_the_gradient_again(hub, tmp_path, monkeypatch) -> None:
    data, told = write_llava(tmp_path), []
    for steps in ("1", "4"):
        monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", steps)
        folder = tmp_path / steps
        folder.mkdir()
        assert in_process("pretrain", "--config", write_config(folder, hub, data, "align")) == 0
        told.append([line["grad_norm"] for line in lines(folder / "align")])
    assert told[0] == told[1]


def test_captions_of_photographs_run_through_both_stages(tmp_path: Path, hub: Path) -> None:
    """COCO's photographs, any size and aspect, as captions and as conversations, with no case of their own."""
    photographs = Path(os.environ.get("MLLM_SHARED_DATA", ROOT.parent / "shared" / "data")) / "coco-train-sample"
    if not photographs.is_dir():
        pytest.skip(f"no {photographs}: set MLLM_SHARED_DATA to the folder that holds coco-train-sample")
    annotations = photographs / "captions_80images.json"
    for stage, script, source in (
        ("align", "pretrain", {}),  # recognised by its content
        ("instruct", "finetune", {"format": "coco", "prompt": "\nDescribe it."}),
    ):
        path = write_config(tmp_path, hub, annotations, stage)
        config = yaml.safe_load(path.read_text())
        config["data"]["sources"] = [
            {"path": str(annotations), "image_dir": str(photographs / "images"), **source},
        ]
        path.write_text(yaml.safe_dump(config))
        assert in_process(script, "--config", path) == 0
    lines = (tmp_path / "instruct" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["skipped"] for line in lines] == [0, 0, 0]


def test_samples_held_out_by_a_flag_and_sources_held_out_in_the_yaml_are_asked_as_often_as_said(
    hub: Path, tmp_path: Path
) -> None:
    path = write_config(tmp_path, hub, write_llava(tmp_path), "align", eval_every=2)
    out = tmp_path / "align"
    assert in_process("pretrain", "--config", path, "--data.held_out", 4, "--data.num_workers", 1) == 0
    assert [sorted(line.get("held_out", [])) for line in lines(out)] == [
        [],
        *[["blank", "gap", "loss", "shuffled"]] * 2,
    ]
    assert json.loads((out / "ledger.json").read_text())["filtered"] == {"held out": 4}
    config = yaml.safe_load(path.read_text())
    (tmp_path / "others").mkdir()
    config["data"]["held_out"] = [{"format": "llava", "path": str(write_llava(tmp_path / "others", 3))}]
    path.write_text(yaml.safe_dump(config))
    assert in_process("pretrain", "--config", path, "--overwrite") == 0
    assert ["held_out" in line for line in lines(out)] == [False, True, True]
    assert json.loads((out / "ledger.json").read_text())["filtered"] == {}
    assert in_process("pretrain", "--config", path, "--overwrite", "--data.held_out", "null") == 2


@pytest.mark.parametrize(
    "flags",
    [
        ("--data.tiles", "anyres", "--data.held_out", 2, "--train.eval_every", 2),
        ("--data.tiles", "dynamic", "--data.max_tiles", 3, "--data.stream", "true"),
        ("--data.image_fit", "crop"),
    ],
    ids=lambda flags: flags[1],
)
def test_tiles_and_numbered_images_train_and_answer_with_what_the_stage_was_told(
    hub: Path, tmp_path: Path, capsys: Any, flags: tuple[object, ...]
) -> None:
    data = write_llava(tmp_path, 8)
    for row, size in enumerate([(60, 20), (60, 20), (20, 60), (20, 60), (30, 30), (30, 30), (90, 80), (90, 80)]):
        picture(row, size).save(tmp_path / "images" / f"{row}.png")
    config, markers = write_config(tmp_path, hub, data, "align"), ("--data.image_markers", "numbered")
    assert in_process("pretrain", "--config", config, *markers, *flags) == 0
    told = capsys.readouterr().out
    assert "(image 1: <Image><image></Image>)" in told
    for policy, words in (("anyres", "(3 to 5 tiles of 4, anyres)"), ("dynamic", "(1 to 4 tiles of 4, dynamic)")):
        assert (words in " ".join(told.split())) == (policy in flags)
    assistant = Assistant.load(str(tmp_path / "align"))
    assert assistant.processor.tiles == (flags[1] if flags[0] == "--data.tiles" else "none")
    sample = Sample("q", [Message("user", [Mark.IMAGE, "what is it?"])], [picture(1, (20, 60))])
    prompt = assistant.processor.prompt(sample)
    newlines = 6 if "anyres" in flags else 0  # one behind each row of three tiles
    assert prompt.input_ids.count(assistant.processor.image_token_id) == 4 * len(prompt.pixel_values) + newlines
    assert len(assistant.answer([sample], max_new_tokens=2)) == 1
