"""The GGUF pair holds the model, tensor for tensor; what llama.cpp would get wrong is refused."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Regex, Tokenizer, models, pre_tokenizers

from mllm import cli
from mllm.export import export
from mllm.export.gguf import llm
from mllm.export.gguf.vocabulary import QWEN2, splits
from mllm.generate import Assistant
from mllm.models.connectors import LinearConnector, PixelShuffleConnector
from stages import make_parts, make_stage

gguf = pytest.importorskip("gguf", reason="gguf is not installed: pip install 'mllm[gguf]'")
LLAMA_CPP = os.environ.get("MLLM_LLAMA_MTMD_CLI", "")
"""The program `llama-mtmd-cli` of llama.cpp."""


def made(folder: Path, llm: str = "llama", encoder: str = "siglip", **stage: Any) -> Path:
    make_parts(folder, encoder, llm)
    return make_stage(folder, lora=True, image_fit="pad", **stage)


def read(path: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    reader = gguf.GGUFReader(str(path))
    tensors = {
        tensor.name: torch.from_numpy(np.array(gguf.quants.dequantize(tensor.data, tensor.tensor_type)))
        for tensor in reader.tensors
    }
    return {name: field.contents() for name, field in reader.fields.items()}, tensors


@pytest.mark.parametrize("family", ["llama", "qwen2", pytest.param("qwen3", marks=pytest.mark.long)])
def test_pair_holds_every_weight_of_the_merged_model(family: str, tmp_path: Path) -> None:
    stage = made(tmp_path, family)
    exported = export(str(stage), tmp_path / "out", "gguf")
    assistant = Assistant.load(stage)
    merged = assistant.model.llm.merge_and_unload()
    facts, tensors = read(tmp_path / "out" / "model.gguf")
    assert facts["general.architecture"] == family
    assert len(facts["tokenizer.ggml.tokens"]) == tensors["token_embd.weight"].shape[0] == 384
    assert facts[f"{family}.rope.freq_base"] == 5e5
    assert facts["tokenizer.ggml.eos_token_id"] == assistant.processor.tokenizer.eos_token_id
    queries = merged.model.layers[1].self_attn.q_proj.weight
    found = tensors["blk.1.attn_q.weight"]
    if family == "llama":  # back from neighbours to halves
        found = found.reshape(4, 4, 2, 32).swapaxes(1, 2).reshape(32, 32)
    torch.testing.assert_close(found, queries)
    torch.testing.assert_close(tensors["blk.0.ffn_down.weight"], merged.model.layers[0].mlp.down_proj.weight)
    assert ("output.weight" in tensors) == (family != "qwen2"), "tied embeddings are written once"
    facts, tensors = read(tmp_path / "out" / "mmproj-model.gguf")
    assert facts["clip.projector_type"] == "mlp"
    assert facts["clip.vision.feature_layer"] == [2]
    torch.testing.assert_close(tensors["mm.2.weight"], assistant.model.connector[2].weight)
    encoder = assistant.model.vision_encoder.model.state_dict()
    torch.testing.assert_close(tensors["v.blk.1.ffn_up.weight"], encoder["encoder.layers.1.mlp.fc1.weight"])
    assert "v.blk.2.ffn_up.weight" not in tensors, "behind the tap"
    assert any("llama.cpp itself was not run" in note for note in exported.notes)


@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float16", marks=pytest.mark.long)])
def test_half_precision_is_read_back_too(dtype: Any, tmp_path: Path) -> None:
    export(str(made(tmp_path)), tmp_path / "out", "gguf", dtype)
    kinds = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(tmp_path / "out/model.gguf").tensors}
    assert kinds["blk.0.attn_q.weight"] == {"bfloat16": "BF16", "float16": "F16"}[dtype]
    assert kinds["output_norm.weight"] == "F32"


@pytest.mark.parametrize(
    ("parts", "stage", "reason"),
    [
        ({"encoder": "clip"}, {}, "issue 25814"),
        pytest.param({"encoder": "dinov2"}, {}, "issue 25814", marks=pytest.mark.long),
        pytest.param({}, {"connector": PixelShuffleConnector()}, "not two linear layers", marks=pytest.mark.long),
        ({}, {"connector": LinearConnector()}, "not two linear layers"),
        pytest.param({}, {"feature_layer": [-2, -3]}, "several layers", marks=pytest.mark.long),
        ({"llm": "gpt_neox"}, {}, "gpt_neox"),
    ],
)
def test_what_llama_cpp_cannot_run_is_refused_with_the_reason(
    parts: Any, stage: Any, reason: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=reason):
        export(str(made(tmp_path, **parts, **stage)), tmp_path / "out", "gguf")
    assert not (tmp_path / "out").exists()


def test_ways_to_split_words_have_llama_cpps_names() -> None:
    def named(*steps: Any, by_words: bool = False) -> str | None:
        tokenizer = Tokenizer(models.BPE())
        last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=by_words)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*steps, last]) if steps else last
        return splits(json.loads(tokenizer.to_str()))

    assert named(by_words=True) == "gpt-2"
    assert named(pre_tokenizers.Split(Regex(QWEN2), "isolated")) == "qwen2"
    llama3 = QWEN2.replace(r"\p{N}|", r"\p{N}{1,3}|")
    assert named(pre_tokenizers.Split(Regex(llama3), "isolated")) == "llama-bpe"
    assert named(pre_tokenizers.Digits(True), by_words=True) == "smollm"
    assert named(pre_tokenizers.Split(Regex(r"\s"), "isolated")) is None


def test_scaling_of_llama_3_is_that_of_transformers() -> None:
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaling = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    rope = {"rope_type": "llama3", "rope_theta": 5e5, **scaling}
    config = LlamaConfig(head_dim=64, num_attention_heads=2, hidden_size=128, rope_parameters=rope)
    frequencies, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain = 1 / 5e5 ** (torch.arange(0, 64, 2, dtype=torch.float32) / 64)
    torch.testing.assert_close(plain / llm.llama3_factors(config), frequencies)


@pytest.mark.skipif(not LLAMA_CPP, reason="no llama.cpp: set MLLM_LLAMA_MTMD_CLI to its llama-mtmd-cli")
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_llama_cpp_gives_the_same_answer(family: str, tmp_path: Path) -> None:
    stage, image = made(tmp_path, family), tmp_path / "x.png"
    export(str(stage), tmp_path / "out", "gguf")
    # as large as the encoder reads: nothing is resized, on either side
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (28, 28, 3), np.uint8)).save(image)
    files = ["-m", tmp_path / "out/model.gguf", "--mmproj", tmp_path / "out/mmproj-model.gguf", "--image", image]
    flags = ["-p", "\nWhat is this?", "-n", "12", "--temp", "0", "-t", "1", "-c", "256", "--jinja", "--no-warmup"]
    for _ in range(5):  # its last words are lost now and then
        done = subprocess.run([LLAMA_CPP, *map(str, files), *flags], capture_output=True)
        assert done.returncode == 0, done.stderr.decode(errors="replace")
        if said := done.stdout.decode(errors="replace").replace("<image>", "").strip():
            break
    assert said == Assistant.load(stage).answer([cli.question([], "What is this?", [str(image)])], 12)[0]
