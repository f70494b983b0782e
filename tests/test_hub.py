"""`mllm push` over HTTP to a Hub of one machine, and the model loaded back from it; no function of ours is replaced."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from export.stages import make_parts, make_stage
from hub_server import TOKEN, Hub, running
from mllm import cli
from mllm.export import export
from mllm.generate import Assistant
from mllm.hub import push as push_here


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    with running() as hub:
        yield hub


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stage with what a run leaves beside its weights."""
    folder = tmp_path_factory.mktemp("parts")
    make_parts(folder, "siglip", "qwen2")
    stage = make_stage(folder, lora=True)
    ledger = {"read": 12, "used": 11, "skipped": {"image": 1}, "filtered": {}, "truncated": {"samples": 0, "tokens": 0}}
    (stage / "ledger.json").write_text(json.dumps(ledger))
    (stage / "metrics.jsonl").write_text('{"step": 7, "loss": 1.25}\n')
    (stage / "shapes.json").write_text(json.dumps({"accuracy": 0.75, "number": 200, "answers": []}))
    return stage


def client(hub: Hub, home: Path, *command: str, token: str = TOKEN) -> subprocess.CompletedProcess[str]:
    """A process of its own: where the Hub is, the client reads once, when it is imported."""
    own = {"HF_ENDPOINT": hub.address, "HF_TOKEN": token, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
    environment = {**os.environ, **own, "HF_HUB_OFFLINE": "0", "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True, timeout=280)


def push(hub: Hub, home: Path, *arguments: object, **options: str) -> subprocess.CompletedProcess[str]:
    return client(hub, home, "-m", "mllm.cli", "push", *map(str, arguments), "--check-with", "here", **options)


LOAD = """
import sys
from transformers import AutoModelForImageTextToText, AutoProcessor
processor = AutoProcessor.from_pretrained(sys.argv[1])
model = AutoModelForImageTextToText.from_pretrained(sys.argv[1])
asked = [{"role": "user", "content": [{"type": "text", "text": "what is it?"}]}]
inputs = processor.apply_chat_template(
    asked, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
)
new = model.generate(**inputs, max_new_tokens=6)
print(ascii(processor.decode(new[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True).strip()))
"""


def test_pushed_model_loads_from_the_hub_and_says_the_same(hub: Hub, stage: Path, tmp_path: Path) -> None:
    done = push(hub, tmp_path, "me/shapes", stage, "--private")
    assert done.returncode == 0, done.stderr
    assert f"pushed: {hub.address}/me/shapes/commit/" in done.stdout
    files = hub.repositories["me/shapes"]
    assert "me/shapes" in hub.private
    assert {"README.md", "config.json", "model.safetensors", "chat_template.jinja", "export.json"} <= files.keys()
    assert not [name for name in files if name.endswith((".bin", ".pt", ".pkl"))]
    assert any("/info/lfs/objects/batch" in request for request in hub.requests)
    back = client(hub, tmp_path, "-c", LOAD, "me/shapes")
    assert back.returncode == 0, back.stderr
    ours = Assistant.load(stage).answer([cli.question([], "what is it?", [])], 6)[0]
    assert back.stdout.strip() == ascii(ours)


def test_card_is_made_of_the_run(stage: Path, tmp_path: Path) -> None:
    text = push_here("me/shapes", str(stage), "merged", dry_run=True).card
    facts = yaml.safe_load(text.split("---\n")[1])
    assert facts["library_name"] == "mllm"
    assert facts["pipeline_tag"] == "image-text-to-text"
    for told in ("as LlavaForConditionalGeneration", "12 read = 11 used + 1 skipped", "loss 1.25", "75.0 % of 200"):
        assert told in text
    for told in ("mllm chat --model me/shapes", "lora:", "rank: 4", "transformers 5", "vLLM"):
        assert told in text
    assert str(stage.parent) not in text, "folders of this machine"


@pytest.mark.long
def test_merged_stage_chats_from_the_hub(hub: Hub, stage: Path, tmp_path: Path) -> None:
    done = push(hub, tmp_path, "me/merged", stage, "--to", "merged")
    assert done.returncode == 0, done.stderr
    assert "names parts of this machine" in done.stdout
    flags = ["--model", "me/merged", "--prompt", "what is it?", "--max-new-tokens", "6", "--json"]
    back = client(hub, tmp_path, "-m", "mllm.cli", "chat", *flags)
    assert back.returncode == 0, back.stderr
    ours = Assistant.load(stage).answer([cli.question([], "what is it?", [])], 6)[0]
    assert json.loads(back.stdout)["answer"] == ours


def test_dry_run_lists_everything_and_sends_nothing(stage: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(sys, "argv", ["mllm", "push", "me/never", str(stage), "--to", "merged", "--dry-run"])
    cli.main()  # offline, in this process: a request would fail
    told = capsys.readouterr().out
    for name in ("README.md", "config.yaml", "connector.safetensors", "llm.safetensors", "library_name: mllm"):
        assert name in told
    assert "nothing was sent to me/never" in told


def test_export_that_is_there_is_sent_as_it_was_proven(
    stage: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    made, own = export(str(stage), tmp_path / "out", "merged"), tmp_path / "stage"
    shutil.copytree(stage, own)
    monkeypatch.setattr("mllm.hub.export", None)  # nobody exports again
    arguments = ["mllm", "push", "me/shapes", str(own), "--exported", str(made.folder), "--dry-run"]
    monkeypatch.setattr(sys, "argv", arguments)
    cli.main()
    told = capsys.readouterr().out
    assert f"proven: {made.proofs[0]}" in told
    assert "library_name: mllm" in told
    assert "nothing was sent" in told
    assert not (made.folder / "README.md").exists()
    monkeypatch.setattr(sys, "argv", [*arguments, "--to", "merged"])
    with pytest.raises(SystemExit, match="--to beside --exported"):
        cli.main()
    config = made.folder / "config.yaml"
    config.write_text(config.read_text() + "\n")
    with pytest.raises(ValueError, match=r"config\.yaml changed since"):
        push_here("me/shapes", str(own), dry_run=True, exported=made.folder)
    (own / "config.yaml").write_text((own / "config.yaml").read_text() + "\n")
    with pytest.raises(ValueError, match="is not an export of"):
        push_here("me/shapes", str(own), dry_run=True, exported=made.folder)
    with pytest.raises(ValueError, match="holds no export"):
        push_here("me/shapes", str(own), dry_run=True, exported=own)


@pytest.mark.long
def test_wrong_token_is_one_line(hub: Hub, stage: Path, tmp_path: Path) -> None:
    done = push(hub, tmp_path, "me/other", stage, "--to", "merged", token="hf_wrong")
    assert done.returncode == 1
    assert "the Hub refused me/other" in done.stderr
    assert "Traceback" not in done.stderr
    assert "me/other" not in hub.repositories


@pytest.mark.parametrize("name", ["shapes", "a/b/c", "/shapes"])
def test_name_that_is_no_repository_is_told(name: str, stage: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["mllm", "push", name, str(stage)])
    with pytest.raises(SystemExit, match="expected OWNER/NAME"):
        cli.main()
