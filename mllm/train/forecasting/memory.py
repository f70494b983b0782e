"""How much memory a step takes on one rank, told before anything is computed.

Enters: a model in which it is chosen what trains, the shape of the largest micro-batch, the settings and what the
launcher chose. Leaves: bytes at the moment of the peak, by what they are for.

What passes is found by a step without data (`shadow`). Weights, gradients and moments follow from counts and from how
they are dealt to the ranks. A model of 7B parameters is predicted on a laptop: its weights may lie on the meta device.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import torch
from torch import nn

from mllm.models.multimodal import MultimodalLM
from mllm.train.forecasting.shadow import Setup, Shape, batch_without_data, held_as, size, trace
from mllm.train.tuning import fp8

STANDING = ("weights", "gathered weights", "moments", "buckets", "batches", "feature cache")
PARTS = (*STANDING, "gradients", "encoder", "activations", "logits and loss", "temporaries")


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank at the moment when it holds most."""

    parts: dict[str, int]
    """What for -> bytes."""
    phases: dict[str, int]
    """Part of the step -> the most that is held in it."""

    @property
    def peak(self) -> int:
        return sum(self.parts.values())

    @property
    def moment(self) -> str:
        """The part of the step that needs most."""
        return max(self.phases, key=lambda name: self.phases[name])


def predict(model: MultimodalLM, shape: Shape, setup: Setup) -> Memory:
    """The peak of one rank in a step whose largest micro-batch has that shape.

    Raises:
        NotImplementedError: the model's own code cannot run on tensors without data; says why.
    """
    phases = trace(model, shape, setup)
    standing = stand(model, setup) + Counter(batches=batch_bytes(model, shape, setup))
    standing["feature cache"] = setup.feature_cache
    phases["update"] = Counter({"gradients": trained_bytes(model), "temporaries": update_temporaries(model, setup)})
    held = {name: standing + dealt(model, name, alive, setup) for name, alive in phases.items()}
    most = max(held.values(), key=Counter.total)
    totals = {name: parts.total() for name, parts in held.items()}
    totals["backward"] = max(totals["backward"], totals.pop("reduce", 0))
    return Memory({part: most[part] for part in PARTS if most[part]}, totals)


def batch_bytes(model: MultimodalLM, shape: Shape, setup: Setup) -> int:
    """Of the micro-batches that lie on the device: of a step all where it is a CPU, else one."""
    one = sum(map(size, batch_without_data(model, shape, torch.device("meta")).values()))
    return one * (setup.accumulation if setup.device.type == "cpu" else 1)


def stand(model: MultimodalLM, setup: Setup) -> Counter[str]:
    """What lies there through the whole step: weights, moments, buckets."""
    ranks, trained = setup.ranks, trained_bytes(model)
    weights = weight_bytes(model, setup) + (fp8.bytes_of_copies(model) if setup.fp8 else 0)
    buffers = sum(map(size, model.buffers()))
    moments = moment_bytes(model, setup.optimizer)
    if not setup.stage:
        buckets = trained if ranks > 1 else 0  # DDP keeps a copy of each gradient in its buckets
        return Counter(weights=weights + buffers, moments=moments, buckets=buckets)
    if setup.stage == 3:
        weights = 0 if setup.offload_weights else weights // ranks
    copies = (moments + trained) // ranks  # DeepSpeed steps a float32 copy of its share, also of float32 weights
    buckets = 4 * setup.bucket if setup.stage == 3 else 0
    moments = 0 if setup.offload_moments else copies
    return Counter(weights=weights + buffers, moments=moments, buckets=buckets)


def dealt(model: MultimodalLM, phase: str, alive: Counter[str], setup: Setup) -> Counter[str]:
    """What a rank holds of what passes. Stages 2 and 3 keep a share of the gradients; 1 and 2 fill a bucket from the
    first gradient on; 3 puts weights together while they are used."""
    mine = Counter(alive)
    if setup.stage == 2:
        mine["gradients"] = alive["gradients"] // setup.ranks
    if setup.stage == 3:  # its share, and the copy that it steps with, from one step to the next (DeepSpeed 0.19)
        mine["gradients"] = 2 * trained_bytes(model) // setup.ranks
    if setup.offload_moments:
        mine["gradients"] = 0
    if setup.stage in (1, 2) and phase == "reduce":
        mine["buckets"] = 4 * setup.bucket
    if setup.stage == 3 and phase != "update":
        weights = weight_bytes(model, setup)
        absent = weights if setup.offload_weights else weights - weights // setup.ranks
        mine["gathered weights"] = min(absent, 4 * setup.bucket + 2 * largest_layer(model, setup))
    return mine


def largest_layer(model: nn.Module, setup: Setup) -> int:
    """Bytes of the weights of one layer."""
    layers = [layer for stack in model.modules() if isinstance(stack, nn.ModuleList) for layer in stack]
    return max((weight_bytes(layer, setup) for layer in layers), default=0)


def weight_bytes(model: nn.Module, setup: Setup) -> int:
    """All weights, whole."""
    return sum(size(parameter, held_as(parameter, setup)) for parameter in model.parameters())


def moment_bytes(model: nn.Module, optimizer: str) -> int:
    """AdamW keeps two numbers for each that trains, Muon one for a matrix."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return sum(size(p) * (1 if optimizer == "muon" and p.ndim == 2 else 2) for p in trained)


def update_temporaries(model: nn.Module, setup: Setup) -> int:
    """What the optimiser computes on the way: AdamW the root of the second moment, one parameter at a time on a CPU
    and all of them at once on a GPU."""
    trained = [size(p) for p in model.parameters() if p.requires_grad]
    if setup.device.type == "cpu" or setup.stage:
        return 2 * max(trained) // (setup.ranks if setup.stage else 1)
    return sum(trained)


def trained_bytes(model: nn.Module) -> int:
    return sum(size(parameter) for parameter in model.parameters() if parameter.requires_grad)
