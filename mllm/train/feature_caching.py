"""Features of the frozen encoder, kept: in memory (`train.feature_cache`) or in a folder (`train.feature_cache_dir`).

Enters: the settings, the model before an engine wraps it. Leaves: the cache at its place in the model; one line
that says what a folder costs and saves, measured before the first step.

The key of an image is the digest of its pixels, which is what the image processor made of the image's bytes. All
else that features hang on is the folder's description, and has to be the same.

P patches, Dv width of the encoder.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mllm.data.index import Index
from mllm.data.plan import Plan
from mllm.data.processor import Processor
from mllm.data.streams.plan import StreamPlan
from mllm.data.streams.reader import Stream
from mllm.models.feature_cache import GROUP, FeatureCache
from mllm.models.feature_folder import FeatureFolder
from mllm.models.multimodal import MultimodalLM
from mllm.models.stored_features import StoredFeatures
from mllm.train.forecasting.feature_probe import measure, verdict
from mllm.types import Batch

if TYPE_CHECKING:
    from accelerate import Accelerator

    from mllm.train.settings import TrainConfig

VOLATILE = ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "architectures", "processor_class")
"""Of configs: what changes no feature. The dtype shows in the weights."""
Cache = FeatureCache | StoredFeatures | None


def switch_on(
    accelerator: Accelerator,
    model: MultimodalLM,
    processor: Processor,
    index: Index | Stream,
    plan: Plan | StreamPlan,
    train: TrainConfig,
) -> Cache:
    """The cache that the settings ask for, put into the model.

    Raises:
        ValueError: the encoder trains, so that its features change from step to step; both caches are asked for; the
            folder belongs to another encoder.
    """
    check(train)
    model.feature_cache = None
    if train.feature_cache_dir:
        model.feature_cache = in_folder(accelerator, model, processor, index, plan, train)
    elif train.feature_cache:
        model.feature_cache = FeatureCache(train.feature_cache)
    return model.feature_cache


def check(train: TrainConfig) -> None:
    """Stop where features cannot be kept."""
    name = "train.feature_cache_dir" if train.feature_cache_dir else "train.feature_cache"
    if train.keeps_features and train.learning_rate.vision_encoder is not None:
        raise ValueError(f"{name} keeps features of a frozen encoder: leave out its learning rate, or this")
    if train.feature_cache and train.feature_cache_dir:
        raise ValueError(
            "train.feature_cache and train.feature_cache_dir keep the same features, in memory and in a folder: "
            "set one of them (the system keeps what is read of a folder in free memory by itself)"
        )


def in_folder(
    accelerator: Accelerator,
    model: MultimodalLM,
    processor: Processor,
    index: Index | Stream,
    plan: Plan | StreamPlan,
    train: TrainConfig,
) -> StoredFeatures:
    """Open the folder, on every rank; the main process measures whether it pays, and says so."""
    assert train.feature_cache_dir
    encoder = model.vision_encoder.to(accelerator.device)
    pixels = torch.uint8 if encoder.normalisation else torch.float32
    blanks = torch.zeros(GROUP, 3, encoder.grid.side, encoder.grid.side, dtype=pixels, device=accelerator.device)

    def encode(pixels: Tensor) -> Tensor:
        # as in the forward pass: accelerate's own autocast does nothing under DeepSpeed
        half = torch.autocast(accelerator.device.type, torch.bfloat16, enabled=train.mixed_precision == "bf16")
        with torch.no_grad(), half:
            return model.kept(pixels)

    made = encode(blanks)  # its shape and dtype are those of all
    shape, limit = tuple(made.shape[1:]), train.feature_cache_dir_gigabytes
    pooling = getattr(model.connector, "pooling", None) if len(made[0]) < encoder.num_patches else None
    wanted = description(encoder, processor, accelerator.device, train.mixed_precision, pooling)
    folder = FeatureFolder(train.feature_cache_dir, wanted, shape, made.dtype, limit, accelerator.print)
    if accelerator.is_main_process:
        measured = measure(train.feature_cache_dir, encode, blanks)
        images = int(index.tiles.sum()) if isinstance(index, Index) else 0
        told = verdict(measured, uses(plan, train), len(folder.places), images)
        print(f"feature cache: {train.feature_cache_dir}: {told}", flush=True)
    return StoredFeatures(folder, pin=accelerator.device.type == "cuda")


def description(
    encoder: Any, processor: Processor, device: torch.device, mixed_precision: str, pooling: str | None = None
) -> dict[str, Any]:
    """What the features of given pixels hang on, in words and digests; JSON values. `pooling` is the connector's."""
    encoders = getattr(encoder, "encoders", (encoder,))
    images: dict[str, Any] = getattr(processor.image_processor, "to_dict", dict)()
    return {
        "encoder weights": weights_digest(encoder),
        "encoder config": digest_of([[without(one.model.config.to_dict()), str(one.grid)] for one in encoders]),
        "feature layers": [list(one.taps) for one in encoders],
        "feature norm": bool(encoder.feature_norm),
        "pooling": pooling,
        "image processor": digest_of([without(images), [str(one.normalisation) for one in encoders]]),
        "mixed precision": mixed_precision,
        "device": device.type,
    }


def without(config: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in config.items() if name not in VOLATILE}


def digest_of(value: Any) -> str:
    return hashlib.blake2b(json.dumps(value, sort_keys=True, default=str).encode(), digest_size=8).hexdigest()


def weights_digest(encoder: torch.nn.Module) -> str:
    """Of names and bytes; about a second a gigabyte."""
    found = hashlib.blake2b(digest_size=8)
    for name, tensor in sorted(encoder.state_dict().items()):
        found.update(f"{name} {tensor.dtype}".encode())
        found.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def uses(plan: Plan | StreamPlan, train: TrainConfig) -> float | None:
    """How often the run sees an image, on average; nobody knows it of a stream."""
    if isinstance(plan, StreamPlan):
        return None
    return train.epochs if train.steps is None else train.steps / plan.steps(1.0)


def one_ahead(cache: Cache, micro_batches: Iterator[Batch], accumulation: int) -> Iterator[Batch]:
    """The same; a folder begins to read for the next step while this one is computed."""
    return cache.one_ahead(micro_batches, accumulation) if isinstance(cache, StoredFeatures) else micro_batches


def finish(cache: Cache) -> None:
    """Wait for what is still to be written."""
    if isinstance(cache, StoredFeatures):
        cache.finish()
