"""Named tensors in one file, whole or not at all.

Enters: tensors by name. Leaves: a safetensors file that was written beside its place and renamed into it; or, the
other way, the same tensors filled from it, after every name and shape was compared.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


def save_tensors(tensors: dict[str, torch.Tensor], path: Path, is_main: bool = True) -> None:
    """Through a file beside it, so that a file of that name is whole."""
    if is_main:
        beside = path.with_suffix(".partial")
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, str(beside))
        beside.rename(path)


def load_tensors(own: dict[str, torch.Tensor], path: Path) -> None:
    """Copy a file into tensors.

    Raises:
        ValueError: names or shapes differ; names them.
    """
    fill_tensors(own, load_file(str(path)), path)


def fill_tensors(own: dict[str, torch.Tensor], saved: dict[str, torch.Tensor], path: Path) -> None:
    """The same with what was read from `path`."""
    wrong = [f"{name}: not in the file" for name in own.keys() - saved.keys()]
    wrong += [f"{name}: not in the model" for name in saved.keys() - own.keys()]
    wrong += [
        f"{name}: {tuple(saved[name].shape)} in the file, {tuple(own[name].shape)} in the model"
        for name in own.keys() & saved.keys()
        if saved[name].shape != own[name].shape
    ]
    if wrong:
        raise ValueError(f"{path} does not fit this model:\n  " + "\n  ".join(sorted(wrong)[:8]))
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(saved[name])
