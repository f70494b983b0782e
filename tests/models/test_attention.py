"""An LLM that lets packed samples see each other is found before the first step."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, BloomConfig, FalconConfig, GPT2Config, MambaConfig, OPTConfig

from conftest import make_llm
from mllm.models.attention import check_isolation

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


def test_check_leaves_no_gradient_behind() -> None:
    llm = make_llm()
    check_isolation(llm)
    assert all(p.grad is None for p in llm.parameters())
