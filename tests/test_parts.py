"""Parts that no recipe names, chosen by flags alone: two encoders, several layers, another LLM, other token counts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BitImageProcessor, Dinov2Config, Dinov2Model

from conftest import make_llm, make_tokenizer, picture, write_llava
from mllm.generate import Assistant
from mllm.models.fused_encoder import FusedEncoder
from mllm.types import Mark, Message, Sample
from test_recipes import in_process, write_config

pytestmark = pytest.mark.recipe
SIDE = {"height": 28, "width": 28}


@pytest.fixture(scope="module")
def shelf(hub: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """DINOv2 beside the CLIP of the other tests, and a Qwen3 of another width."""
    folder = tmp_path_factory.mktemp("shelf")
    torch.manual_seed(0)
    sizes = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2, "patch_size": 14}
    Dinov2Model(Dinov2Config(**sizes, image_size=70)).save_pretrained(folder / "dinov2")
    BitImageProcessor(size={"shortest_edge": 32}, crop_size=SIDE).save_pretrained(folder / "dinov2")
    make_llm("qwen3", hidden_size=48).save_pretrained(folder / "qwen3")
    make_tokenizer().save_pretrained(folder / "qwen3")
    return folder


def test_two_encoders_with_two_layers_each_are_trained_retuned_and_asked(
    hub: Path, shelf: Path, tmp_path: Path, capsys: Any
) -> None:
    data, both = write_llava(tmp_path), f"[{hub / 'encoder'}, {shelf / 'dinov2'}]"
    flags = ["--model.vision_encoder", both, "--model.feature_layer", "[-2, -1]", "--model.connector.type", "avg_pool"]
    align = write_config(tmp_path, hub, data, "align", feature_cache=0.1)
    assert in_process("pretrain", "--config", align, *flags, "--model.connector.tokens", 1) == 0
    capsys.readouterr()
    tune = write_config(tmp_path, hub, data, "instruct", learning_rate={"connector": 1e-3, "llm": 1e-3})
    assert in_process("finetune", "--config", tune, "--model.connector.tokens", 4, "--train.lora.rank", 2) == 0
    said = "".join(capsys.readouterr().out.split())  # lines are as wide as the screen
    assert f"startingfrom{tmp_path / 'align'}withitsconnector" in said
    assert "tokens=1" in said
    assistant = Assistant.load(tmp_path / "instruct", "cpu")
    encoder = assistant.model.vision_encoder
    assert isinstance(encoder, FusedEncoder)
    assert (encoder.width, assistant.processor.num_visual_tokens) == (2 * 2 * 24, 4)
    asked = Sample("one", [Message("user", [Mark.IMAGE, "what is 3 0?"])], [picture(3)])
    assert isinstance(assistant.answer([asked], 4)[0], str)


def test_llm_is_swapped_by_flags_once_the_connector_may_start_anew(
    hub: Path, shelf: Path, tmp_path: Path, capsys: Any
) -> None:
    data = write_llava(tmp_path)
    assert in_process("pretrain", "--config", write_config(tmp_path, hub, data, "align")) == 0
    again: list[Any] = ["--config", write_config(tmp_path, hub, data, "instruct"), "--model.llm", shelf / "qwen3"]
    assert in_process("pretrain", *again) == 2
    told = capsys.readouterr().err
    assert "0.weight: (32, 24) in the file, (48, 24) in the model" in told
    assert "Nothing is drawn anew unasked" in told
    assert not (tmp_path / "instruct").exists()
    assert in_process("pretrain", *again, "--init_parts") == 0
    losses = [json.loads(line)["loss"] for line in (tmp_path / "instruct" / "metrics.jsonl").read_text().splitlines()]
    assert all(0 < loss < 10 for loss in losses)


def test_connector_that_reads_the_question_goes_through_both_stages_and_chats(
    hub: Path, tmp_path: Path, capsys: Any
) -> None:
    data, sizes = write_llava(tmp_path), {"instruct": "true", "num_queries": 3, "hidden_size": 16, "num_layers": 2}
    flags: list[Any] = ["--model.connector.type", "qformer", "--model.connector.num_heads", 2]
    for name, value in sizes.items():
        flags += [f"--model.connector.{name}", value]
    align = write_config(tmp_path, hub, data, "align", feature_cache=0.1)
    assert in_process("pretrain", "--config", align, *flags, "--data.num_workers", 1) == 0
    assert in_process("finetune", "--config", write_config(tmp_path, hub, data, "instruct")) == 0
    assistant = Assistant.load(tmp_path / "instruct", "cpu")
    asked = [Sample("s", [Message("user", [Mark.IMAGE, words])], [picture(3)]) for words in ("what?", "how many?")]
    seen = [assistant.inputs([assistant.processor.prompt(sample)])["inputs_embeds"][0] for sample in asked]
    place = assistant.processor.prompt(asked[0]).input_ids.index(assistant.processor.image_token_id)
    assert not torch.equal(seen[0][place], seen[1][place])
    assert len(assistant.answer(asked, 4)) == 2
