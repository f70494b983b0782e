"""One token through an LLM of Llama's kind by `kernels`, with the weights of transformers' own modules.

Enters: a token, its position, the cache. Leaves: logits. Which LLMs are of this kind is asked of their structure; that
the numbers are theirs is tried before the first answer (`recorded`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mllm.decoding.cache import KeptCache
from mllm.decoding.fixed import FixedForward

KINDS = ("llama", "qwen2", "mistral")
"""Architectures whose layers are: norm, attention with turned queries and keys, norm, gated SiLU."""
HEADS = (32, 64, 128, 256)
"""Widths of a head: powers of two, whose halves tensor cores take."""
MOST_SHARED = 16
"""Queries of one key that the kernel has room for."""
PROJECTIONS = ("q_proj", "k_proj", "v_proj")
NEAR = 0.99
"""Cosine of logits; rounding in half precision leaves 0.999 and more."""


def fusable(llm: Any) -> bool:
    """Are its layers of this kind, with plain weights (no adapter) in half precision, and without a window?"""
    config = llm.config
    if config.model_type not in KINDS or llm.dtype not in (torch.bfloat16, torch.float16):
        return False
    layers = llm.get_decoder().layers
    width, shared = layers[0].self_attn.head_dim, config.num_attention_heads // config.num_key_value_heads
    return (
        not windowed(config)
        and config.hidden_act == "silu"
        and shared <= MOST_SHARED
        and width in HEADS
        and all(type(part) is nn.Linear for layer in layers for part in linears(layer))
        and all(part.bias is None for layer in layers for part in layer.mlp.children() if isinstance(part, nn.Linear))
    )


def windowed(config: Any) -> bool:
    """Does any layer see but the last tokens?"""
    kinds = getattr(config, "layer_types", None)
    return "sliding_attention" in kinds if kinds else getattr(config, "sliding_window", None) is not None


def linears(layer: Any) -> list[nn.Module]:
    attention, mlp = layer.self_attn, layer.mlp
    return [
        *(getattr(attention, name) for name in PROJECTIONS),
        attention.o_proj,
        mlp.gate_proj,
        mlp.up_proj,
        mlp.down_proj,
    ]


class FusedForward(FixedForward):
    """Weights side by side where one kernel reads several."""

    def __init__(self, llm: Any, cache: KeptCache) -> None:
        super().__init__(llm, cache, 1)
        self.decoder = llm.get_decoder()
        self.joint = [joined([getattr(layer.self_attn, name) for name in PROJECTIONS]) for layer in self.decoder.layers]

    def prove(self) -> None:
        """Raises a `ValueError` where the logits of a token are not those of the LLM's own forward, up to rounding."""
        own = FixedForward(self.llm, self.cache, 1)
        own.positions.copy_(self.positions)
        own.token.copy_(self.token)
        mine, theirs = self.logits().flatten().float(), own.logits().flatten().float()
        likeness = float(torch.nn.functional.cosine_similarity(mine, theirs, dim=0))
        if not likeness > NEAR:
            raise ValueError(f"the kernels of decoding give other logits than the LLM: cosine {likeness:.4f}")

    def logits(self) -> Tensor:
        from mllm.decoding.kernels import attend, matvec

        state = self.decoder.embed_tokens(self.token)  # [1, 1, K]
        cosine, sine = self.decoder.rotary_emb(state, self.positions[None])  # [1, 1, D] each
        state = state.flatten()
        for layer, kept, (weight, bias) in zip(self.decoder.layers, self.cache.layers, self.joint, strict=True):
            attention, mlp = layer.self_attn, layer.mlp
            asked = matvec(state, weight, bias=bias, norm=layer.input_layernorm)
            seen = attend(asked, kept.keys, kept.values, cosine, sine, self.positions, attention.scaling)
            state = matvec(seen, attention.o_proj.weight, bias=attention.o_proj.bias, residual=state)
            gated = matvec(state, mlp.gate_proj.weight, mlp.up_proj.weight, norm=layer.post_attention_layernorm)
            state = matvec(gated, mlp.down_proj.weight, residual=state)
        return matvec(state, self.llm.get_output_embeddings().weight, norm=self.decoder.norm)[None, None]


def joined(parts: list[Any]) -> tuple[Tensor, Tensor | None]:
    """One weight and one bias of several linear layers that read the same."""
    weight = torch.cat([part.weight.detach() for part in parts])
    return weight, None if parts[0].bias is None else torch.cat([part.bias.detach() for part in parts])
