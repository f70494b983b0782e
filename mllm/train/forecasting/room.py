"""How much memory and disk there is for this run.

Enters: the device, the output folder. Leaves: bytes.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import torch

from mllm.models.multimodal import MultimodalLM
from mllm.train.forecasting.memory import moment_bytes, trained_bytes
from mllm.train.forecasting.shadow import size
from mllm.train.stage_folder import without_adapter

USABLE = 0.92
"""Share of a GPU's memory that tensors can have: the rest goes to the driver, libraries and gaps between tensors."""
LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
"""Where Linux says what a container may take."""


def memory_for(device: torch.device) -> int:
    """Bytes that the tensors of one rank may take: of a GPU nearly all, of the computer's memory an equal share for
    each rank that runs on it."""
    if device.type == "cuda":
        return int(USABLE * torch.cuda.get_device_properties(device).total_memory)
    import psutil

    limits = [
        int(text) for path in map(Path, LIMITS) if path.is_file() and (text := path.read_text().strip()).isdigit()
    ]
    return min([psutil.virtual_memory().total, *limits]) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def disk_free(folder: Path) -> int:
    """Bytes where the folder is, or will be."""
    return shutil.disk_usage(nearest(folder)).free


def filesystem(folder: Path) -> int:
    """The number of the filesystem where the folder is, or will be."""
    return nearest(folder).stat().st_dev


def nearest(folder: Path) -> Path:
    """The folder, or the first above it that there is."""
    return next(place for place in (folder, *folder.absolute().parents) if place.exists())


def checkpoint_bytes(model: MultimodalLM, optimizer: str) -> int:
    """One checkpoint: what trains, and its moments."""
    return trained_bytes(model) + moment_bytes(model, optimizer)


def stage_bytes(model: MultimodalLM) -> int:
    """The tensors of the finished stage folder: the connector, adapters, and each part that is not its Hub id's."""
    always = [part for part in (model.connector, model.image_newline) if part is not None]
    return sum(size(parameter) for part in always for parameter in part.parameters()) + sum(
        part_bytes(part) for part in (model.vision_encoder, model.llm)
    )


def part_bytes(part: Any) -> int:
    adapter = [p for name, p in part.named_parameters() if ".lora_" in name]
    trains = any(p.requires_grad for p in part.parameters()) and not adapter
    whole = without_adapter(part).values() if trains or getattr(part, "differs_from_hub", False) else []
    return sum(map(size, [*adapter, *whole]))
