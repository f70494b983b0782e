"""`import mllm` teaches transformers' Auto classes, in fresh processes, whichever of the two is imported first."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from export.stages import make_parts, make_stage
from mllm.export.proof import as_parts, questions
from mllm.export.trained import load
from mllm.export.transformers_folder import write_files
from mllm.generate import Assistant
from mllm.models.connectors import MLPConnector, PixelShuffleConnector, QFormerConnector

BOTH = "from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor\n"
ORDERS = {
    "mllm first": "import mllm\n",
    "mllm last": f"{BOTH}import mllm\n",
    "ours itself first": "import mllm.export.remote_code.modeling_mllm\n",
}


each_order = pytest.mark.parametrize("order", ORDERS)
"""Long: a fresh process takes seconds. The fast suite has one."""


ASK = (
    f"import json, sys\n{BOTH}"
    + """
found = []
messages = json.loads(sys.argv[1])
for folder in sys.argv[2:]:
    processor = AutoProcessor.from_pretrained(folder)
    model = AutoModelForImageTextToText.from_pretrained(folder).eval()
    inputs = processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    new = model.generate(**inputs, max_new_tokens=8, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    words = processor.decode(new, skip_special_tokens=True).strip()
    config = AutoConfig.from_pretrained(folder)
    found.append([type(config).__name__, type(model).__module__, type(model).__name__, words])
print(json.dumps(found))
"""
)


def run(code: str, *arguments: object) -> str:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.strip().splitlines()[-1]


def test_import_loads_neither_transformers_nor_torch() -> None:
    heavy = "[name for name in ('torch', 'transformers', 'pydantic', 'numpy') if name in sys.modules]"
    assert run(f"import sys, mllm\nprint({heavy})") == "[]"


def test_exported_folder_loads_without_remote_code(tmp_path: Path) -> None:
    make_parts(tmp_path, llm="qwen2")
    stage = make_stage(tmp_path, PixelShuffleConnector(), lora=True)
    write_files(load(str(stage)), tmp_path / "exported", torch.float32)
    sample = questions(tmp_path)[1]
    ours = Assistant.load(stage, "cpu").answer([sample], 8)[0]
    (found,) = json.loads(run(ORDERS["mllm first"] + ASK, json.dumps(as_parts(sample)), tmp_path / "exported"))
    assert found == ["MllmConfig", "mllm.export.remote_code.modeling_mllm", "MllmForConditionalGeneration", ours]


@pytest.mark.parametrize("home", ["MllmForConditionalGeneration", "LlavaForConditionalGeneration"])
def test_stage_loads_as_what_it_would_be_exported_as(home: str, tmp_path: Path) -> None:
    """In this process, which has imported mllm."""
    make_parts(tmp_path, "siglip")
    stage = make_stage(tmp_path, PixelShuffleConnector() if home.startswith("Mllm") else MLPConnector(), lora=True)
    model, processor = AutoModelForImageTextToText.from_pretrained(stage), AutoProcessor.from_pretrained(stage)
    assert (type(model).__name__, model.dtype) == (home, torch.float32)
    sample = questions(tmp_path)[1]
    inputs = processor.apply_chat_template(
        as_parts(sample), add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    ours = Assistant.load(stage, "cpu")
    theirs = model.generate(**inputs, max_new_tokens=8, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert processor.decode(theirs, skip_special_tokens=True).strip() == ours.answer([sample], 8)[0]
    half = AutoModelForImageTextToText.from_pretrained(stage, dtype="bfloat16")
    assert half.dtype == torch.bfloat16


def test_stage_that_is_not_exported_says_why(tmp_path: Path) -> None:
    make_parts(tmp_path)
    stage = make_stage(tmp_path, QFormerConnector(num_queries=2, hidden_size=16, num_heads=2, instruct=True))
    with pytest.raises(ValueError, match="`instruct: true` is not exported"):
        AutoModelForImageTextToText.from_pretrained(stage)
    with pytest.raises(ValueError, match="`instruct: true` is not exported"):
        AutoProcessor.from_pretrained(stage)


@pytest.mark.long
@each_order
def test_stage_is_the_stock_class_that_holds_it(order: str, tmp_path: Path) -> None:
    make_parts(tmp_path, "siglip")
    stage = make_stage(tmp_path, image_fit="pad", lora=True)
    sample = questions(tmp_path)[1]
    ours = Assistant.load(stage, "cpu").answer([sample], 8)[0]
    (found,) = json.loads(run(ORDERS[order] + ASK, json.dumps(as_parts(sample)), stage))
    assert found == [
        "MllmStageConfig",
        "transformers.models.llava.modeling_llava",
        "LlavaForConditionalGeneration",
        ours,
    ]


@pytest.mark.long
@each_order
def test_every_auto_class_knows_ours(order: str) -> None:
    ask = """
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING
config, stage = (type(AutoConfig.for_model(name)) for name in ("mllm", "mllm_stage"))
known = [AutoModel._model_mapping[config], AutoModelForImageTextToText._model_mapping[config]]
known += [AutoModelForImageTextToText._model_mapping[stage], PROCESSOR_MAPPING[stage]]
print(" ".join(cls.__name__ for cls in known))
"""
    assert run(ORDERS[order] + ask) == "MllmModel MllmForConditionalGeneration MllmStage MllmStageProcessor"
