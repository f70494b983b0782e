"""Rows to 8-bit floats, each with its own scale, in one pass.

Enters: [M, K] in any float type. Leaves: [M, K] in e4m3, and the float32 scale [M, 1] that gives the numbers back.
A row is read once and kept in registers, where torch's eager way reads and writes it some eight times.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor


@torch.library.custom_op("mllm::rows_to_fp8", mutates_args=(), device_types="cuda")
def rows_to_fp8(rows: Tensor) -> tuple[Tensor, Tensor]:
    """[M, K] contiguous -> [M, K] e4m3, [M, 1] float32. An operation of its own, which torch's compiler leaves as it
    is: the same kernel in a compiled block and outside."""
    number, width = rows.shape
    eight = torch.empty(number, width, device=rows.device, dtype=torch.float8_e4m3fn)
    scale = torch.empty(number, 1, device=rows.device, dtype=torch.float32)
    block = triton.next_power_of_2(width)
    with torch.cuda.device(rows.device):
        quantise_row[(number,)](rows, eight, scale, width, BLOCK=block, num_warps=max(4, min(32, block // 1024)))
    return eight, scale


@rows_to_fp8.register_fake
def shapes(rows: Tensor) -> tuple[Tensor, Tensor]:
    """What comes out, without data."""
    return torch.empty_like(rows, dtype=torch.float8_e4m3fn), rows.new_empty(len(rows), 1, dtype=torch.float32)


@triton.jit
def quantise_row(rows, eight, scales, width, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """One program a row: its largest number becomes 448 (`LARGEST` and `LEAST` of `tuning/fp8.py`)."""
    row = tl.program_id(0).to(tl.int64)
    here = tl.arange(0, BLOCK)
    value = tl.load(rows + row * width + here, mask=here < width, other=0.0).to(tl.float32)
    scale = tl.maximum(tl.max(tl.abs(value), 0) / 448.0, 1e-30)
    tl.store(scales + row, scale)
    tl.store(eight + row * width + here, (value / scale).to(tl.float8e4nv), mask=here < width)
