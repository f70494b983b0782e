"""One GGUF file: what is written into it, and the same read back.

Enters: settings as methods of gguf's writer with their arguments, tensors by GGUF name. Leaves: the file.
Matrices take the wanted type, vectors stay float32, as llama.cpp's own converter has it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass
class File:
    """`architecture` is GGUF's word; `settings` are (method of `gguf.GGUFWriter`, arguments)."""

    architecture: str
    settings: list[tuple[Any, ...]]
    tensors: dict[str, Tensor]

    def write(self, path: Path, dtype: torch.dtype) -> None:
        import gguf

        writer = gguf.GGUFWriter(str(path), self.architecture)
        for method, *arguments in self.settings:
            getattr(writer, method)(*arguments)
        writer.add_file_type(
            {
                torch.float32: gguf.LlamaFileType.ALL_F32,
                torch.float16: gguf.LlamaFileType.MOSTLY_F16,
                torch.bfloat16: gguf.LlamaFileType.MOSTLY_BF16,
            }[dtype]
        )
        for name, tensor in self.tensors.items():
            kind = stored_as(name, tensor, dtype)
            writer.add_tensor(name, packed(tensor, kind), raw_dtype=gguf_type(kind))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()

    def read_back(self, path: Path, dtype: torch.dtype) -> None:
        """Compare the file with what was meant, name by name, shape by shape, number by number."""
        import gguf

        found = {tensor.name: tensor for tensor in gguf.GGUFReader(str(path)).tensors}
        assert found.keys() == self.tensors.keys(), found.keys() ^ self.tensors.keys()
        for name, meant in self.tensors.items():
            read = torch.from_numpy(np.array(gguf.quants.dequantize(found[name].data, found[name].tensor_type)))
            rounded = meant.to(stored_as(name, meant, dtype)).float()
            if tuple(reversed(found[name].shape.tolist())) != tuple(meant.shape) or not torch.equal(
                read.reshape(meant.shape), rounded
            ):
                raise ValueError(f"not exported: {path.name} holds another {name} than the model")


def stored_as(name: str, tensor: Tensor, dtype: torch.dtype) -> torch.dtype:
    """llama.cpp adds biases, norms and positions in float32; it has no convolution in bfloat16."""
    if tensor.ndim == 1 or "position" in name:
        return torch.float32
    if "patch_embd" in name and dtype == torch.bfloat16:
        return torch.float32
    return dtype


def gguf_type(dtype: torch.dtype) -> Any:
    import gguf

    kinds = gguf.GGMLQuantizationType
    return {torch.float32: kinds.F32, torch.float16: kinds.F16, torch.bfloat16: kinds.BF16}[dtype]


def packed(tensor: Tensor, dtype: torch.dtype) -> np.ndarray[Any, Any]:
    """As the writer takes it: bfloat16, which numpy does not have, as bytes."""
    rounded = tensor.detach().to(dtype).contiguous()
    return rounded.view(torch.uint8).numpy() if dtype == torch.bfloat16 else rounded.numpy()
