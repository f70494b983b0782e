"""A vision encoder's own image processor by id, as one that makes squares of a fixed size.

Enters: a Hub id or folder. Leaves: an image processor of transformers, which the data side runs on pictures and the
model side asks for size and normalisation: both must read the same one, so it is read here.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import isqrt
from typing import Any

KEPT = ("resample", "do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std")
"""What a plain image processor takes over from a special one."""


def load_image_processor(name: str) -> Any:
    """The encoder's own, with two exceptions that become plain ones (resize to a square, rescale, normalise).

    SigLIP2 NaFlex keeps the aspect of each picture, up to `max_num_patches`; here it reads squares of that many
    patches, which is what it makes of a square picture. DINOv3 has an image processor for torchvision only; Pillow's
    resize differs from that by less than one of 255 levels a pixel.

    Raises:
        OSError, ValueError: there is none.
    """
    from transformers import AutoImageProcessor
    from transformers.image_processing_base import ImageProcessingMixin

    try:
        found = AutoImageProcessor.from_pretrained(name)
    except ImportError:
        settings, _ = ImageProcessingMixin.get_image_processor_dict(name)
        return plain(settings, dict(settings["size"]))
    if not hasattr(found, "max_num_patches"):
        return found
    side = isqrt(found.max_num_patches) * found.patch_size
    return plain(found.to_dict(), {"height": side, "width": side})


def plain(settings: Mapping[str, Any], size: dict[str, int]) -> Any:
    """Resize, rescale, normalise."""
    from transformers import ViTImageProcessor

    return ViTImageProcessor(size=size, **{name: settings[name] for name in KEPT if name in settings})


def square_side(image_processor: Any) -> int | None:
    """Pixels along a side of what it makes; None where that is not one number."""
    cropped = getattr(image_processor, "do_center_crop", False)
    size = getattr(image_processor, "crop_size" if cropped else "size", None)
    sides = {length for length in dict(size or {}).values() if length}
    return sides.pop() if len(sides) == 1 else None
