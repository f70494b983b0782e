"""Named tensors in one file, whole or not at all.

Enters: tensors by name. Leaves: a safetensors file that was written beside its place and renamed into it; or, the
other way, the same tensors filled from it, after every name and shape was compared.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from mllm.models.deferred import defer, from_file
from mllm.train.saving.durable import sync


def save_tensors(tensors: dict[str, torch.Tensor], path: Path, is_main: bool = True) -> None:
    """Through a file beside it, so that a file of that name is whole."""
    if is_main:
        beside = path.with_suffix(".partial")
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, str(beside))
        sync(beside)
        beside.rename(path)
        sync(path.parent)


def load_tensors(own: dict[str, torch.Tensor], path: Path) -> None:
    """Copy a file into tensors, one at a time; deferred weights will be read from it.

    Raises:
        ValueError: names or shapes differ; names them.
    """
    with safe_open(str(path), "pt") as opened:
        compare(own, {name: opened.get_slice(name).get_shape() for name in opened.keys()}, path)  # noqa: SIM118
    for name, tensor in own.items():
        read = from_file(path, name, tensor)
        if tensor.is_meta:
            defer(tensor, read)
        else:
            with torch.no_grad():
                tensor.copy_(read())


def fill_tensors(own: dict[str, torch.Tensor], saved: dict[str, torch.Tensor], path: Path) -> None:
    """The same with what was read from `path`."""
    compare(own, {name: list(tensor.shape) for name, tensor in saved.items()}, path)
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(saved[name])


def compare(own: dict[str, torch.Tensor], saved: dict[str, list[int]], path: Path) -> None:
    """Every name and shape, of the tensors and of the file."""
    wrong = [f"{name}: not in the file" for name in own.keys() - saved.keys()]
    wrong += [f"{name}: not in the model" for name in saved.keys() - own.keys()]
    wrong += [
        f"{name}: {tuple(saved[name])} in the file, {tuple(own[name].shape)} in the model"
        for name in own.keys() & saved.keys()
        if saved[name] != list(own[name].shape)
    ]
    if wrong:
        raise ValueError(f"{path} does not fit this model:\n  " + "\n  ".join(sorted(wrong)[:8]))
