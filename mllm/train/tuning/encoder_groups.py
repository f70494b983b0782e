"""How many images go through the encoder together: `train.encoder_batch`.

Enters: the model, the settings, what the launcher chose. Leaves: the groups in which a frozen encoder takes the images
of a step, or none. Rows of text with one or two images leave an encoder half idle, the more the smaller it is.

By itself this happens where it changes nothing but the last bits of features, which hang on how many images an encoder
is shown: it is frozen, whole on every rank, and keeps nothing; and an update has several micro-batches, since those of
one are together already. Every rank chooses alike.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mllm.models.image_groups import Groups
from mllm.models.multimodal import MultimodalLM
from mllm.train.engines import fsdp, zero

if TYPE_CHECKING:
    from accelerate import Accelerator

    from mllm.data.loader import DataConfig
    from mllm.train.settings import TrainConfig

PATCHES, ON_CPU = 16_384, 2_048
"""Of a group that nobody chose. A GPU's products are full by then, and features of 1152 numbers in bfloat16 take 38 MB;
a CPU's caches are full much earlier."""


def check(accelerator: Accelerator, train: TrainConfig, data: DataConfig) -> None:
    """Stop where groups were asked for and cannot be had.

    Raises:
        ValueError: names the setting and what to do.
    """
    asked = train.encoder_batch and train.encoder_batch != "auto"
    if asked and is_sharded(accelerator):
        raise ValueError(
            "train.encoder_batch where the encoder is sharded (ZeRO stage 3, FSDP2): ranks with more images would call "
            "it more often, and wait for the others for ever: use ZeRO stage 2, or leave it out"
        )
    if data.image_fit == "aspect" and (asked or train.keeps_features):
        raise ValueError(
            "data.image_fit aspect with train.encoder_batch, train.feature_cache or train.feature_cache_dir, which "
            "hand the encoder pixels without the shape of their grid: leave them out"
        )


def chosen(accelerator: Accelerator, model: MultimodalLM, train: TrainConfig) -> Groups | None:
    """Those of the settings; None where an encoder takes the images of each micro-batch."""
    if train.encoder_batch != "auto":
        return Groups(train.encoder_batch) if train.encoder_batch else None
    trains = any(parameter.requires_grad for parameter in model.vision_encoder.parameters())
    if trains or is_sharded(accelerator) or train.keeps_features or model.native_aspect:
        return None
    patches = ON_CPU if accelerator.device.type == "cpu" else PATCHES
    return Groups(max(1, patches // model.vision_encoder.num_patches), filled=False)


def is_sharded(accelerator: Accelerator) -> bool:
    return zero.stage(accelerator) == 3 or fsdp.requested()
