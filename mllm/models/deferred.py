"""Weights that are read when they are needed: an LLM known in full, of which nothing lies in memory yet.

Enters: the id or folder of an LLM. Leaves: the LLM with each weight on the meta device (a shape and a dtype without
memory), and with each weight the way to read it. Freezing, LoRA, the weights of an earlier stage and a resumed
checkpoint then change what will be read; who shards the model reads one weight after the other, keeps its share and
lets go of the rest, so that the whole never exists on a rank. A dry run need not read at all.
"""

from __future__ import annotations

import contextlib
import re
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

Read = Callable[[], Tensor]

ALWAYS_UNEXPECTED = re.compile(r"rotary_emb\.inv_freq$")
"""Stored by old checkpoints, computed by every model."""


class CannotDefer(Exception):
    """This LLM must be read by transformers, whole; says why."""


def empty_llm(name: str, dtype: torch.dtype, attention: str) -> Any:
    """The LLM of an id or folder from its config alone: weights on the meta device, buffers (rotary frequencies) real.

    Raises:
        CannotDefer: its class needs weights to be made.
    """
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(name)
    try:
        with init_empty_weights(include_buffers=False):
            llm = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)
    except (RuntimeError, NotImplementedError) as error:  # it computes with its weights while it is made
        raise CannotDefer(f"it cannot be made without weights ({error})") from error
    llm.tie_weights()  # what was tied inside was made anew on the meta device
    return llm.eval()


def deferred_llm(name: str, dtype: torch.dtype, attention: str, random_weights: bool = False) -> Any:
    """An LLM each of whose weights knows how to be read: from the checkpoint's safetensors files, or drawn.

    Raises:
        CannotDefer: the files do not hold this model's own names and shapes (transformers can convert them), or it
            keeps some weights in another precision.
    """
    llm = empty_llm(name, dtype, attention)
    if random_weights:
        deviation = getattr(llm.config.get_text_config(), "initializer_range", 0.02)
        for weight_name, weight in llm.named_parameters():
            defer(weight, drawn(weight_name, weight, deviation))
        return llm
    if getattr(llm.config, "quantization_config", None) is not None:
        raise CannotDefer("its weights are quantised")
    kept = {*(llm._keep_in_fp32_modules or ()), *(llm._keep_in_fp32_modules_strict or ())}
    if kept and dtype != torch.float32:
        raise CannotDefer(f"{', '.join(sorted(kept))} stay in float32")
    files = find_files(name)
    check_names(llm, files)
    for weight_name, weight in llm.named_parameters():
        defer(weight, from_file(files[weight_name], weight_name, weight))
    for buffer_name, buffer in llm.named_buffers():
        if buffer_name in files:
            buffer.copy_(from_file(files[buffer_name], buffer_name, buffer)())
    return llm


def find_files(name: str) -> dict[str, Path]:
    """Which safetensors file of the checkpoint holds which tensor."""
    import json

    from safetensors import safe_open
    from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

    index = cached_file(name, SAFE_WEIGHTS_INDEX_NAME, _raise_exceptions_for_missing_entries=False)
    if index is not None:
        held = json.loads(Path(index).read_text())["weight_map"]
        places = {file: Path(str(cached_file(name, file))) for file in sorted(set(held.values()))}
        return {tensor: places[file] for tensor, file in held.items()}
    single = cached_file(name, SAFE_WEIGHTS_NAME, _raise_exceptions_for_missing_entries=False)
    if single is None:
        raise CannotDefer("its checkpoint has no safetensors files")
    with safe_open(single, "pt") as opened:
        return dict.fromkeys(opened.keys(), Path(single))


def check_names(llm: Any, files: dict[str, Path]) -> None:
    """Every weight once, under its own name and in its own shape, and nothing else."""
    own = dict(llm.named_parameters())
    known = {*llm.state_dict().keys(), *(name for name, _ in llm.named_buffers())}
    ignored = [ALWAYS_UNEXPECTED, *map(re.compile, llm._keys_to_ignore_on_load_unexpected or ())]
    if missing := own.keys() - files.keys():
        raise CannotDefer(f"its files name their tensors otherwise: no {min(missing)}")
    if strange := {name for name in files.keys() - known if not any(pattern.search(name) for pattern in ignored)}:
        raise CannotDefer(f"its files hold what the model has no place for: {min(strange)}")
    if twice := files.keys() & (llm.state_dict().keys() - own.keys() - {name for name, _ in llm.named_buffers()}):
        raise CannotDefer(f"its files hold {min(twice)} beside the weight that it is tied to")
    for name, weight in own.items():
        if (found := shape_in_file(files[name], name)) != weight.shape:
            raise CannotDefer(f"{name} is {tuple(found)} in its files and {tuple(weight.shape)} in the model")


def shape_in_file(path: Path, name: str) -> torch.Size:
    """From the header alone."""
    from safetensors import safe_open

    with safe_open(str(path), "pt") as opened:
        return torch.Size(opened.get_slice(name).get_shape())


def from_file(path: Path, name: str, like: Tensor) -> Read:
    """Read one tensor of a safetensors file, in the dtype that `like` has now."""
    from safetensors import safe_open

    dtype = like.dtype

    def read() -> Tensor:
        with safe_open(str(path), "pt") as opened:
            return opened.get_tensor(name).to(dtype)

    return read


def drawn(name: str, like: Tensor, deviation: float) -> Read:
    """Draw one weight, the same on every rank: matrices at random, scales one, biases zero."""
    shape, dtype = like.shape, like.dtype

    def read() -> Tensor:
        if len(shape) < 2:
            return torch.zeros(shape, dtype=dtype) if name.endswith("bias") else torch.ones(shape, dtype=dtype)
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        return torch.empty(shape, dtype=dtype).normal_(0.0, deviation, generator=generator)

    return read


def defer(weight: Tensor, read: Read) -> None:
    """From now on this is what the weight will hold."""
    assert weight.is_meta, "only what has no memory can be read later"
    weight.read_weight = read  # type: ignore[attr-defined]


def is_deferred(module: nn.Module) -> bool:
    """Are there weights that nobody has read yet?"""
    return any(weight.is_meta for weight in module.parameters())


def materialise(weight: nn.Parameter, device: torch.device | str = "cpu", values: bool = True) -> None:
    """Give a deferred weight its memory; any other stays as it is. Without `values` it holds anything: another rank's
    will come over it. It remains the same object, so that what is tied to it, or lists it, still has it."""
    if not weight.is_meta:
        return
    if values:
        value = weight.read_weight().to(device, weight.dtype)  # type: ignore[attr-defined]
        assert value.shape == weight.shape, (value.shape, weight.shape)
    else:
        value = torch.empty(weight.shape, dtype=weight.dtype, device=device)
    torch.utils.swap_tensors(weight, nn.Parameter(value, requires_grad=weight.requires_grad))


@contextlib.contextmanager
def stand_ins(module: nn.Module) -> Iterator[None]:
    """Deferred weights pass for weights of the CPU, of one number each: peft would put its adapters on the meta
    device too, and lose what they were drawn as."""
    deferred = [weight for weight in module.parameters() if weight.is_meta]
    held = [nn.Parameter(torch.zeros(1, dtype=w.dtype).expand(w.shape), w.requires_grad) for w in deferred]
    exchange(deferred, held)
    try:
        yield
    finally:
        for weight, stood_in in zip(deferred, held, strict=True):
            stood_in.requires_grad_(weight.requires_grad)  # chosen in the meantime
        exchange(deferred, held)


def exchange(ones: list[nn.Parameter], others: list[nn.Parameter]) -> None:
    for one, other in zip(ones, others, strict=True):
        torch.utils.swap_tensors(one, other)


def merge_deferred(llm: Any) -> Any:
    """peft's `merge_and_unload` for deferred weights: each will be read with its adapter in it."""
    for layer in llm.modules():
        if hasattr(layer, "get_delta_weight") and layer.base_layer.weight.is_meta:
            defer(layer.base_layer.weight, merged(layer))
    with stand_ins(llm):
        return llm.unload()


def merged(layer: Any) -> Read:
    """What a LoRA layer's weight is with its adapters in it."""
    plain = layer.base_layer.weight.read_weight

    def read() -> Tensor:
        value = plain().clone()
        for adapter in layer.active_adapters:
            value += layer.get_delta_weight(adapter)
        return value

    return read
