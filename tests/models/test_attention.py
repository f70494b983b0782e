"""An LLM that lets packed samples see each other is found before the first step."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, BloomConfig, FalconConfig, GPT2Config, MambaConfig, OPTConfig

from conftest import make_llm
from mllm.models.attention import check_isolation, check_length, check_prompt, check_rotation

SMALL = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2}
LEAKING = {
    "opt": OPTConfig(**SMALL, ffn_dim=64, num_attention_heads=4, word_embed_proj_dim=32, max_position_embeddings=64),
    "falcon": FalconConfig(**SMALL, num_attention_heads=4),
    "bloom": BloomConfig(**SMALL, n_head=4),
    "mamba": MambaConfig(**SMALL, state_size=4),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_llm_that_isolates_packed_samples_passes(family: str, attention: str, dtype: torch.dtype) -> None:
    check_isolation(make_llm(family, attention).to(dtype).requires_grad_(False))


def test_learned_positions_pass_too() -> None:
    config = GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=64)
    check_isolation(AutoModelForCausalLM.from_config(config))


@pytest.mark.parametrize("family", LEAKING)
def test_llm_that_leaks_between_packed_samples_is_refused_with_the_remedy(family: str) -> None:
    torch.manual_seed(0)
    with pytest.raises(ValueError, match=r"see each other.*data\.packing"):
        check_isolation(AutoModelForCausalLM.from_config(LEAKING[family], attn_implementation="eager"))


ROPES = {
    "longrope": ("phi3", {"short_factor": [1.0] * 4, "long_factor": [3.0] * 4, "original_max_position_embeddings": 16}),
    "dynamic": ("llama", {"factor": 2.0}),
    "yarn": ("llama", {"factor": 4.0, "original_max_position_embeddings": 16}),
    "llama3": (
        "llama",
        {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16},
    ),
}


@pytest.mark.parametrize("kind", ROPES)
@pytest.mark.parametrize("longest", [16, 30])
def test_rotation_that_hangs_on_the_longest_sample_is_refused_and_no_other(kind: str, longest: int) -> None:
    """What the check says is what the LLM does: the neighbour of a long sample is asked."""
    family, more = ROPES[kind]
    rope = {"rope_type": kind, "rope_theta": 1e4, **more}
    size = 16 if kind == "dynamic" else 64
    phi = {"sliding_window": None, "original_max_position_embeddings": 16} if family == "phi3" else {}
    llm = make_llm(family, rope_parameters=rope, max_position_embeddings=size, **phi).eval()
    short, long = torch.arange(6, 14), torch.arange(6, 6 + longest)
    positions = torch.cat([torch.arange(8), torch.arange(longest)])[None]
    with torch.no_grad():
        alone = llm(input_ids=short[None], position_ids=torch.arange(8)[None], use_cache=False).logits
        beside = llm(input_ids=torch.cat([short, long])[None], position_ids=positions, use_cache=False).logits[:, :8]
    if torch.allclose(alone, beside, rtol=0, atol=1e-5):
        check_rotation(llm, longest)
    else:
        with pytest.raises(ValueError, match=rf"{kind} positions.*longer than 16 .*seq_length to at most 16"):
            check_rotation(llm, longest)
    assert torch.allclose(alone, beside, rtol=0, atol=1e-5) == (longest == 16 or kind in ("yarn", "llama3"))


def test_sample_beyond_a_table_of_positions_is_refused_before_the_first_step() -> None:
    config = GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=64)
    llm = AutoModelForCausalLM.from_config(config)
    assert check_length(llm, 64) == ""
    with pytest.raises(ValueError, match=r"GPT2LMHeadModel has learned 64 positions.*seq_length to at most 64"):
        check_length(llm, 65)
    assert check_prompt(llm, 64) == ""
    with pytest.raises(ValueError, match=r"the conversation has 65 tokens.*ask with fewer words"):
        check_prompt(llm, 65)
    with pytest.raises(IndexError):
        llm(input_ids=torch.zeros(1, 65, dtype=torch.long))
    with pytest.raises(ValueError, match="OPTForCausalLM has learned 64 positions"):
        check_length(AutoModelForCausalLM.from_config(LEAKING["opt"]), 65)


def test_sample_beyond_the_rotary_positions_that_were_learned_is_a_warning() -> None:
    llm = make_llm(max_position_embeddings=64)
    assert check_length(llm, 64) == ""
    assert check_length(llm, 65).startswith("a sample of 65 tokens, and LlamaForCausalLM has learned 64 positions:")
    assert llm(input_ids=torch.zeros(1, 65, dtype=torch.long)).logits.isfinite().all()


def test_an_llm_below_an_adapter_is_named_by_its_own_class() -> None:
    llm = get_peft_model(make_llm(max_position_embeddings=64), LoraConfig(r=2, target_modules=["q_proj"]))
    assert "LlamaForCausalLM" in check_length(llm, 65)


def test_check_leaves_no_gradient_behind() -> None:
    llm = make_llm()
    check_isolation(llm)
    assert all(p.grad is None for p in llm.parameters())
