"""A deferred LLM is the LLM that transformers reads whole, whatever was done to it before its weights were read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    OPTConfig,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
)

from conftest import ENDS, make_processor
from mllm.models.attention import check_isolation
from mllm.models.build import ModelConfig, build_model, load_llm
from mllm.models.deferred import CannotDefer, deferred_llm, materialise
from mllm.models.multimodal import MultimodalLM
from mllm.train.stage_folder import load_stage, save_stage
from mllm.train.trainable import LearningRates, Lora, choose_trainable

SMALL = {
    "vocab_size": 384,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    **ENDS,
}
GPT2 = GPT2Config(vocab_size=384, n_embd=32, n_layer=3, n_head=4, n_positions=64, **ENDS)
OPT = OPTConfig(**SMALL, ffn_dim=64, word_embed_proj_dim=32)
PLAIN = {
    "llama": LlamaConfig(**SMALL),
    "llama, tied": LlamaConfig(**SMALL, tie_word_embeddings=True),
    "qwen2": Qwen2Config(**SMALL),
    "qwen3": Qwen3Config(**SMALL),
    "mistral": MistralConfig(**SMALL),
    "gemma3": Gemma3TextConfig(**SMALL),
    "phi3": Phi3Config(**SMALL),
    "gpt2": GPT2,
    "opt": OPT,
}
"""Families whose files hold the model's own names."""


def saved(folder: Path, config: Any, **options: Any) -> str:
    torch.manual_seed(0)
    llm = AutoModelForCausalLM.from_config(config)
    for weight in llm.parameters():
        torch.nn.init.normal_(weight, std=0.3)  # biases and scales too
    llm.save_pretrained(folder, **options)
    return str(folder)


def materialised(llm: Any) -> Any:
    for weight in llm.parameters():
        materialise(weight)
    return llm


def assert_same(one: torch.nn.Module, other: torch.nn.Module) -> None:
    for kind in ("named_parameters", "named_buffers"):
        expected, found = dict(getattr(one, kind)()), dict(getattr(other, kind)())
        assert list(expected) == list(found)
        for name, tensor in expected.items():
            assert found[name].dtype == tensor.dtype, name
            assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("family", PLAIN)
def test_deferred_llm_becomes_the_one_that_transformers_reads(family: str, tmp_path: Path) -> None:
    name = saved(tmp_path, PLAIN[family], max_shard_size="20KB")
    whole = load_llm(ModelConfig("-", name))
    deferred = deferred_llm(name, torch.float32, "sdpa")
    assert all(weight.is_meta for weight in deferred.parameters())
    assert sum(p.numel() for p in deferred.parameters()) == sum(p.numel() for p in whole.parameters())
    assert_same(whole, materialised(deferred))
    ids = torch.arange(7)[None] + 10
    with torch.no_grad():
        assert torch.equal(deferred(input_ids=ids).logits, whole(input_ids=ids).logits)


def test_weights_that_are_read_in_bfloat16_and_train_are_rounded_once_as_those_of_a_whole_model(
    hub: Path, tmp_path: Path
) -> None:
    config = ModelConfig(str(hub / "encoder"), saved(tmp_path, PLAIN["qwen2"]), dtype="bfloat16")
    models = [build_model(config, 7, deferred) for deferred in (False, True)]
    for model in models:
        choose_trainable(model, LearningRates(llm=1e-4), None)
    assert {weight.dtype for weight in models[1].llm.parameters()} == {torch.float32}
    materialised(models[1].llm)
    assert_same(models[0].llm, models[1].llm)


def without(name: str, tensor: str, **more: torch.Tensor) -> None:
    path = Path(name) / "model.safetensors"
    tensors = load_file(path)
    tensors.pop(tensor, None)
    save_file({**tensors, **more}, path, {"format": "pt"})


def test_llm_whose_files_need_a_conversion_is_read_whole_and_says_why(tmp_path: Path) -> None:
    experts = saved(tmp_path / "experts", MixtralConfig(**SMALL, num_local_experts=2))
    with pytest.raises(CannotDefer, match=r"name their tensors otherwise: no model\.layers"):
        deferred_llm(experts, torch.float32, "sdpa")
    llm = load_llm(ModelConfig("-", experts), deferred=True)
    assert not any(weight.is_meta for weight in llm.parameters())
    assert "name their tensors otherwise" in llm.whole_because

    odd = saved(tmp_path / "odd", PLAIN["llama"])
    without(odd, "", **{"model.extra": torch.zeros(1)})
    with pytest.raises(CannotDefer, match=r"no place for: model\.extra"):
        deferred_llm(odd, torch.float32, "sdpa")

    tied = saved(tmp_path / "tied", PLAIN["llama, tied"])
    without(tied, "", **{"lm_head.weight": torch.zeros(384, 32)})
    with pytest.raises(CannotDefer, match=r"hold lm_head\.weight beside"):
        deferred_llm(tied, torch.float32, "sdpa")

    narrow = saved(tmp_path / "narrow", PLAIN["llama"])
    without(narrow, "", **{"model.norm.weight": torch.zeros(31)})
    with pytest.raises(CannotDefer, match=r"\(31,\) in its files and \(32,\) in the model"):
        deferred_llm(narrow, torch.float32, "sdpa")

    (tmp_path / "tied" / "model.safetensors").unlink()
    with pytest.raises(CannotDefer, match="no safetensors files"):
        deferred_llm(tied, torch.float32, "sdpa")


def test_rotary_frequencies_of_old_checkpoints_are_passed_over(tmp_path: Path) -> None:
    name = saved(tmp_path, PLAIN["llama"])
    without(name, "", **{"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4)})
    assert_same(load_llm(ModelConfig("-", name)), materialised(deferred_llm(name, torch.float32, "sdpa")))


LORA = Lora(rank=4, alpha=8)
RATES = LearningRates(connector=1e-3, llm=1e-3)


def chosen(hub: Path, name: str, deferred: bool, init_from: Path | None, lora: Lora | None) -> MultimodalLM:
    torch.manual_seed(3)
    model = build_model(ModelConfig(str(hub / "encoder"), name), 7, deferred)
    if init_from:
        load_stage(model, init_from)
    choose_trainable(model, RATES, lora)
    return model


@pytest.mark.parametrize("family", ["llama, tied", "gpt2"])
def test_lora_an_earlier_adapter_a_merged_one_and_whole_weights_are_those_of_a_whole_model(
    hub: Path, tmp_path: Path, family: str
) -> None:
    name = saved(tmp_path / "llm", PLAIN[family])
    before: Path | None = None
    for number, lora in enumerate((LORA, LORA, None, None)):
        whole, deferred = (chosen(hub, name, deferred, before, lora) for deferred in (False, True))
        assert any(weight.is_meta for weight in deferred.llm.parameters())
        trains = [[name for name, p in model.named_parameters() if p.requires_grad] for model in (whole, deferred)]
        assert trains[0] == trains[1]
        materialised(deferred.llm)
        assert_same(whole, deferred)
        assert getattr(whole.llm, "differs_from_hub", False) == getattr(deferred.llm, "differs_from_hub", False)
        with torch.no_grad():
            for weight in whole.parameters():
                if weight.requires_grad:
                    weight += 0.1 * torch.randn_like(weight)
        before = tmp_path / f"stage-{number}"
        before.mkdir()
        save_stage(before, whole, make_processor(), "model: {}\n")
        if lora:
            settings = json.loads((before / "adapter" / "adapter_config.json").read_text())
            save_stage(before, deferred, make_processor(), "model: {}\n")
            assert json.loads((before / "adapter" / "adapter_config.json").read_text()) == settings
            save_stage(before, whole, make_processor(), "model: {}\n")


@pytest.mark.parametrize("family", ["qwen3", "gemma3", "opt", "gpt2"])
def test_packing_is_tried_on_a_twin_of_few_layers_with_the_same_verdict(family: str, tmp_path: Path) -> None:
    name = saved(tmp_path, PLAIN[family])
    verdicts = []
    for llm in (load_llm(ModelConfig("-", name)), deferred_llm(name, torch.float32, "sdpa")):
        try:
            verdicts.append(check_isolation(llm))
        except ValueError as error:
            verdicts.append(str(error))
    assert verdicts[0] == verdicts[1]
    assert (verdicts[0] is None) == (family != "opt")


def test_random_weights_are_the_same_wherever_they_are_drawn_and_have_a_loss(tmp_path: Path) -> None:
    PLAIN["llama, tied"].save_pretrained(tmp_path)
    ones, others = (materialised(deferred_llm(str(tmp_path), torch.float32, "sdpa", True)) for _ in range(2))
    assert_same(ones, others)
    ids = torch.arange(9)[None] + 10
    loss = float(ones(input_ids=ids, labels=ids).loss.detach())
    assert loss == pytest.approx(torch.log(torch.tensor(384.0)).item(), abs=0.5)


def test_nothing_is_read_before_a_weight_is_asked_for(hub: Path, tmp_path: Path) -> None:
    name = saved(tmp_path, PLAIN["llama"])
    model = build_model(ModelConfig(str(hub / "encoder"), name), 7, deferred=True)
    choose_trainable(model, RATES, LORA)
    check_isolation(model.llm)
    (tmp_path / "model.safetensors").unlink()
    frozen = [weight for weight in model.llm.parameters() if weight.is_meta]
    assert {weight.requires_grad for weight in frozen} == {False}
    with pytest.raises(FileNotFoundError):
        materialise(frozen[0])
