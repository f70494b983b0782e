"""Which attention an LLM is built with, and whether that is right: `model.attention`.

Enters: the setting and the LLM's config. Leaves: a name for transformers, or a `ValueError` before the first step.

`auto` takes the first that this machine and this LLM can: torch's `varlen`, flash-attn's `flash`, FlexAttention
(`flex`), and `sdpa`, which masks all pairs of a row, or `eager` where sdpa would leave out what the LLM does to its
scores (Gemma 2 caps them). On a CPU it is one of the last two; `by_sample` is faster there, the more so the
longer a row is than its samples, and differs from it in rounding.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from mllm.models.packed.boundaries import Boundaries, as_mask, boundaries
from mllm.models.packed.function import NAMES, register
from mllm.models.packed.kernels import VARLEN, has_flash

Attention = Literal["auto", "varlen", "flash", "flex", "by_sample", "sdpa", "eager"]
IMPLEMENTATIONS = {name: own for own, name in NAMES.items()} | {"flex": "flex_attention"}
"""As transformers calls them, where it does so otherwise."""
KNOWN_LAYERS = {"full_attention", "sliding_attention"}
WIDEST = 256
"""Of a head, for FlashAttention 2; also a multiple of 8."""


def implementation(choice: Attention, config: Any) -> str:
    """The name of the attention function for an LLM of this config."""
    register()
    if choice == "auto":
        choice = best(config)
    if choice == "sdpa" and beyond_sdpa(config):
        raise ValueError(
            "attention implementation sdpa leaves out what this LLM does to its scores: set model.attention to eager"
        )
    return IMPLEMENTATIONS.get(choice, choice)


def best(config: Any) -> Attention:
    """The first that can: for training, since who generates is served by sdpa behind the kernels' names too."""
    own: Attention = "eager" if beyond_sdpa(config) else "sdpa"
    if not torch.cuda.is_available():
        return own
    kernels: tuple[Attention, ...] = ("varlen", "flash")
    for kernel in kernels:
        if not obstacles(kernel, config):
            return kernel
    return "flex" if own == "eager" and getattr(llm_class(config), "_supports_flex_attn", False) else own


def beyond_sdpa(config: Any) -> bool:
    """Does this LLM's attention do more than sdpa? transformers 5.17 would
    leave the cap of Gemma 2 out in silence."""
    caps = getattr(config.get_text_config(), "attn_logit_softcapping", None)
    return bool(caps) or not getattr(llm_class(config), "_supports_sdpa", True)


def llm_class(config: Any) -> Any:
    """transformers' class for it; None where only its own code has one."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM._model_mapping.get(type(config), None)


def obstacles(kernel: Attention, config: Any) -> list[str]:
    """What stands in the way of a kernel for many lengths, on this machine and for this LLM."""
    found = [] if kernel == "by_sample" else obstacles_here(kernel)
    text, kind = config.get_text_config(), llm_class(config)
    if not getattr(kind, "_supports_attention_backend", False):
        found.append("this LLM has an attention of its own")
    if beyond_sdpa(config):
        found.append("this LLM's attention is more than sdpa computes (it caps its scores, or has sinks)")
    if strange := set(getattr(text, "layer_types", None) or ()) - KNOWN_LAYERS:
        found.append(f"this LLM has layers of {', '.join(sorted(strange))}")
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    if kernel != "by_sample" and (width % 8 or width > WIDEST):
        found.append(f"a head of {width} numbers: expected a multiple of 8 up to {WIDEST}")
    if getattr(text, "attention_dropout", 0):
        found.append("this LLM drops attention out (attention_dropout)")
    if kernel == "varlen" and "window_size" not in VARLEN and getattr(text, "sliding_window", None):
        found.append(f"the varlen of torch {torch.__version__} knows no sliding window")
    return found


def obstacles_here(kernel: Attention) -> list[str]:
    """What this machine lacks for a kernel that runs on CUDA devices."""
    found = []
    if kernel == "varlen" and not VARLEN:
        found.append(f"torch {torch.__version__} has no torch.nn.attention.varlen")
    if kernel == "flash" and not has_flash():
        found.append("flash-attn is not installed: pip install 'mllm[flash]'")
    if not torch.cuda.is_available():
        found.append("there is no CUDA device")
    elif torch.cuda.get_device_capability() < (8, 0):
        found.append("the CUDA device is older than Ampere")
    return found


def packed_mask(llm: Any, embeddings: Tensor, position_ids: Tensor, samples: Boundaries | None = None) -> Tensor | None:
    """The boundaries for every layer [1, 1, L, M + 1], where the LLM was built for a kernel that reads them and this
    batch can go there; None leaves the mask to transformers, which reads it from the positions."""
    is_half = embeddings.dtype != torch.float32 or torch.is_autocast_enabled(embeddings.device.type)
    if not reads_boundaries(llm) or (embeddings.is_cuda and not is_half):
        return None
    if samples is None:
        if not embeddings.is_cuda and NAMES[llm.config._attn_implementation] != "by_sample":
            return None
        made = boundaries(position_ids)
        samples = Boundaries(made.starts.to(embeddings.device), made.longest)
    return as_mask(samples)


def reads_boundaries(llm: Any) -> bool:
    """Was the LLM built for such a kernel?"""
    return llm.config._attn_implementation in NAMES


def check_attention(choice: Attention, llm: Any, device: torch.device) -> None:
    """Before the first step: does this attention run here, and is it the LLM's own?

    Raises:
        ValueError: says why not, and what to set.
    """
    remedy = "set model.attention to auto or sdpa"
    if choice == "flex" and device.type == "cpu":
        raise ValueError(f"model.attention flex cannot train on a CPU (torch has no backward pass for it): {remedy}")
    if choice in NAMES.values() and (found := obstacles(choice, llm.config)):
        raise ValueError(f"model.attention {choice}: {'; '.join(found)}: {remedy}")
    if choice in ("varlen", "flash") and device.type != "cuda":
        raise ValueError(f"model.attention {choice} on a {device.type}: it needs a CUDA device; {remedy}")
    if choice == "by_sample" and device.type != "cpu":
        raise ValueError(f"model.attention by_sample on a {device.type}: it is for CPUs; {remedy}")
    if llm.config._attn_implementation in NAMES:
        prove(llm)


def prove(llm: Any) -> None:
    """The kernel's route through this family must say what its own does: tried on a twin of few layers, on the CPU,
    with a window as narrow as the samples. A family may hide a window, or a scale, where no kernel is told of it.

    Raises:
        ValueError: the two differ.
    """
    from mllm.models.attention import shrunk_twin

    config, window = llm.config.get_text_config(), {}
    if getattr(config, "sliding_window", None):
        window = {"sliding_window": 3}
    twin = shrunk_twin(llm, **window).float().eval()
    width = twin.get_input_embeddings().embedding_dim
    for weight in twin.parameters():  # as they are drawn, all tokens would look alike
        if weight.ndim == 2:
            torch.nn.init.normal_(weight, 0, width**-0.5, torch.Generator().manual_seed(1))
    row = torch.randn(1, 16, width, generator=torch.Generator().manual_seed(0))
    positions = torch.cat([torch.arange(9), torch.arange(7)])[None]
    decoder = twin.get_decoder()
    with torch.no_grad():
        own, ours = (
            decoder(inputs_embeds=row, attention_mask=mask, position_ids=positions, use_cache=False).last_hidden_state
            for mask in (None, as_mask(boundaries(positions)))
        )
    if not torch.allclose(own, ours, rtol=1e-3, atol=1e-4):
        raise ValueError(
            f"{type(llm).__name__} attends otherwise through a kernel for packed rows than by its own masks: "
            f"set model.attention to sdpa or eager"
        )
