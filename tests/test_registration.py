"""`import mllm` teaches transformers' Auto classes, in fresh processes, whichever of the two is imported first."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from export.stages import make_parts, make_stage
from mllm.export.proof import as_parts, questions
from mllm.export.trained import load
from mllm.export.transformers_folder import write_files
from mllm.generate import Assistant
from mllm.models.connectors import PixelShuffleConnector

BOTH = "from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor\n"
ORDERS = {
    "mllm first": "import mllm\n",
    "mllm last": f"{BOTH}import mllm\n",
    "ours itself first": "import mllm.export.remote_code.modeling_mllm\n",
}


def orders(fast: str) -> list[Any]:
    """One in the fast suite: a fresh process takes seconds."""
    return [pytest.param(name, marks=[] if name == fast else pytest.mark.long) for name in ORDERS]


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


@pytest.mark.parametrize("order", orders("mllm first"))
def test_own_folders_load_without_remote_code(order: str, tmp_path: Path) -> None:
    """An exported folder that no stock class holds; the stage itself; a stage that stock Llava holds."""
    make_parts(tmp_path / "own", llm="qwen2")
    make_parts(tmp_path / "llava", "siglip")
    stage = make_stage(tmp_path / "own", PixelShuffleConnector(), lora=True)
    llava = make_stage(tmp_path / "llava", image_fit="pad")
    write_files(load(str(stage)), tmp_path / "exported", torch.float32)
    sample = questions(tmp_path)[1]
    ours = [Assistant.load(folder, "cpu").answer([sample], 8)[0] for folder in (stage, llava)]
    folders = [tmp_path / "exported", stage, llava]
    found = json.loads(run(ORDERS[order] + ASK, json.dumps(as_parts(sample)), *folders))
    code, stock = "mllm.export.remote_code.modeling_mllm", "transformers.models.llava.modeling_llava"
    assert found == [
        ["MllmConfig", code, "MllmForConditionalGeneration", ours[0]],
        ["MllmStageConfig", code, "MllmForConditionalGeneration", ours[0]],
        ["MllmStageConfig", stock, "LlavaForConditionalGeneration", ours[1]],
    ]


@pytest.mark.parametrize("order", orders("mllm last"))
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
