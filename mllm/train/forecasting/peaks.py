"""Operations a second that a device could do: what MFU is a share of.

Enters: a device and the type of its numbers. Leaves: the rate of the maker's data sheet; of a device that is not in the
table, and of every CPU, the rate of a matrix product that is timed on it.
"""

from __future__ import annotations

import time

import torch

PEAKS: dict[str, dict[str, float]] = {
    # NVIDIA's data sheets, dense (half of what is printed for sparse matrices), accumulated in float32
    "B200": {"half": 2250e12, "float": 75e12},
    "H200": {"half": 989e12, "float": 67e12},
    "GH200": {"half": 989e12, "float": 67e12},
    "H100 NVL": {"half": 835e12, "float": 60e12},
    "H100 PCIe": {"half": 756e12, "float": 51e12},
    "H100": {"half": 989e12, "float": 67e12},
    "A100": {"half": 312e12, "float": 19.5e12},
    "A800": {"half": 312e12, "float": 19.5e12},
    "L40S": {"half": 362e12, "float": 91.6e12},
    "L4": {"half": 121e12, "float": 30.3e12},
    "A10G": {"half": 70e12, "float": 35e12},
    "A10": {"half": 125e12, "float": 31.2e12},
    "A40": {"half": 150e12, "float": 37.4e12},
    "RTX A6000": {"half": 155e12, "float": 38.7e12},
    "RTX 4090": {"half": 165e12, "float": 82.6e12},
    "RTX 3090": {"half": 71e12, "float": 35.6e12},
    # AMD's data sheet
    "MI300X": {"half": 1307e12, "float": 163.4e12},
}
"""Operations a second by the name of the device; of several names that fit, the longest. `half` is bfloat16 and
float16, `float` is float32 without TF32."""
SIDE = 1024
"""Of the matrices by which a device that is not in the table is measured."""


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second that the device could do: of its data sheet, or, where that is not known, of a matrix product
    timed here and now (a CPU: its number depends on what else runs)."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        if peak := known_peak(name, dtype):
            return peak
    return measured_peak(device, dtype)


def known_peak(name: str, dtype: torch.dtype) -> float | None:
    """The data sheet's number for a device of that name."""
    fitting = [known for known in PEAKS if f" {known} " in f" {name.replace('-', ' ')} "]
    if not fitting:
        return None
    return PEAKS[max(fitting, key=len)]["float" if dtype == torch.float32 else "half"]


def measured_peak(device: torch.device, dtype: torch.dtype, times: int = 5) -> float:
    """The best of a few products of square matrices."""
    matrix = torch.randn(SIDE, SIDE, device=device).to(dtype)
    product = matrix @ matrix  # the first one chooses its kernel
    best = float("inf")
    for _ in range(times):
        finish(device)
        start = time.perf_counter()
        torch.mm(matrix, matrix, out=product)
        finish(device)
        best = min(best, time.perf_counter() - start)
    return 2 * SIDE**3 / best


def finish(device: torch.device) -> None:
    """Wait for what the device was told to do."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
