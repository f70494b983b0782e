"""The LLM's linear layers in four bits (NF4, Dettmers et al. 2023, arXiv 2305.14314), through bitsandbytes.

Enters: an LLM. Leaves: the same with `Linear4bit` where it had `Linear`, its head excepted; or back, with the weights
that the four bits stand for. Only the LLM is handed in here: encoder and connector cannot be touched.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

NF4: dict[str, Any] = {"compress_statistics": True, "quant_type": "nf4"}
"""What `quantisation_config` says, in the words of bitsandbytes' own layers."""


def quantisation_config(dtype: torch.dtype) -> Any:
    """What `from_pretrained` is told: NF4, its scales quantised too, products computed in `dtype`. The head, and what
    is tied to it, stay as they are: transformers' own default where no list is given.

    Raises:
        ValueError: bitsandbytes is not installed.
    """
    check_installed()
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


def check_installed() -> None:
    from importlib.util import find_spec

    if find_spec("bitsandbytes") is None:
        raise ValueError("model.quantisation nf4 needs bitsandbytes: pip install 'mllm[quantize]', or leave it out")


def is_4bit(parameter: torch.Tensor) -> bool:
    """Asked by name: importing bitsandbytes costs a second, and a model without it need not pay."""
    return type(parameter).__name__ == "Params4bit"


def is_quantised(module: nn.Module) -> bool:
    return any(is_4bit(parameter) for parameter in module.parameters())


def numel(parameter: torch.Tensor) -> int:
    """Weights of a parameter: four bits are packed two in a byte, so that its own count is half of them."""
    return int(parameter.quant_state.shape.numel()) if is_4bit(parameter) else parameter.numel()  # type: ignore[attr-defined]


def quantise(llm: Any, dtype: torch.dtype) -> None:
    """In place, an LLM that is in memory already, as `from_pretrained` does it on the way from disk."""
    check_installed()
    from bitsandbytes.nn import Linear4bit, Params4bit

    head = llm.get_output_embeddings()
    for name, module in list(llm.named_modules()):
        if type(module) is nn.Linear and module is not head:
            with torch.device("meta"):
                packed = Linear4bit(module.in_features, module.out_features, False, dtype, **NF4)
            weight: Any = Params4bit(module.weight.data, requires_grad=False, module=packed, **NF4)
            packed.weight = weight.to(module.weight.device)
            packed.bias = module.bias
            llm.set_submodule(name, packed.train(module.training))
    keep_layout(llm)
    llm.config.quantization_config = quantisation_config(dtype)
    llm.is_loaded_in_4bit = llm.is_quantized = True


def keep_layout(llm: nn.Module) -> None:
    """Some CPUs (AVX512-BF16) would repack the weights in the first forward pass without gradients, compute in
    bfloat16 from then on, and have no gradient any more: an evaluation would end the training behind it."""
    for module in llm.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]


def dequantise(llm: Any) -> None:
    """In place: each 4-bit layer becomes a plain one with the weights that it computed with."""
    from bitsandbytes.functional import dequantize_4bit

    for name, module in list(llm.named_modules()):
        if type(module).__name__ == "Linear4bit" and is_4bit(module.weight):
            with torch.device("meta"):
                plain = nn.Linear(module.in_features, module.out_features, bias=False)
            weight = dequantize_4bit(module.weight.data, module.weight.quant_state)
            plain.weight = nn.Parameter(weight, requires_grad=False)
            plain.bias = module.bias
            llm.set_submodule(name, plain.train(module.training))
    for mark in ("quantization_config", "_pre_quantization_dtype"):
        llm.config.__dict__.pop(mark, None)
    for mark in ("is_loaded_in_4bit", "is_quantized", "hf_quantizer", "quantization_method"):
        llm.__dict__.pop(mark, None)


def round_to_4bit(llm: Any) -> None:
    """In place: full weights become what their four bits stand for, which is what an adapter of QLoRA was trained
    on."""
    quantise(llm, llm.dtype)
    dequantise(llm)


def packed_parts(parameters: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What turns each packed weight back into numbers (its scales), by bitsandbytes' own names, in the computer's
    memory."""
    return {
        f"{name}.{key}": value.detach().cpu()
        for name, parameter in parameters.items()
        if is_4bit(parameter)
        for key, value in parameter.quant_state.as_dict(packed=True).items()  # type: ignore[attr-defined]
    }


def fill(llm: nn.Module, saved: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Give the 4-bit layers their weights from a file, packed or in full; returns what the file holds for others."""
    from bitsandbytes.nn import Params4bit

    left = dict(saved)
    for name, module in llm.named_modules():
        if type(module).__name__ != "Linear4bit":
            continue
        own, key = module.weight, f"{name}.weight"
        if key not in left:
            continue  # the caller tells: it has no weight for this name
        value = left.pop(key)
        parts = {part: left.pop(part) for part in list(left) if part.startswith(f"{key}.")}
        if parts:
            stats = {part.removeprefix(f"{name}."): tensor for part, tensor in parts.items()}
            fresh: Any = Params4bit.from_prequantized(value, stats, device=own.device, module=module)
        else:
            full = value.to(own.quant_state.dtype)
            fresh = Params4bit(full, requires_grad=False, module=module, **NF4)
        module.weight = fresh.to(own.device)
    return left
