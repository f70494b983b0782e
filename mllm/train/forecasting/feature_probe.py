"""Will a folder of features pay? Measured before the first step on a few blank images.

Enters: a folder, and what encodes a group of images. Leaves: seconds and bytes of one image, and a sentence. The
entries are written to a folder beside the real ones, brought to the disk and out of the computer's memory, read, and
deleted.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from mllm.models.feature_cache import digest
from mllm.models.feature_folder import FeatureFolder


@dataclass(frozen=True)
class Measured:
    """Of one image."""

    encode: float
    """Seconds."""
    write: float
    read: float
    size: int
    """Bytes."""


def measure(
    folder: Path, encode: Callable[[Tensor], Tensor], pixels: Tensor, clock: Callable[[], float] = time.perf_counter
) -> Measured:
    """`encode` gives features [n, P, Dv] of `pixels` [n, 3, H, W] on the device, and has run before, so that nothing is
    set up in it any more. To read is to digest the pixels as well."""
    device = pixels.device
    start = now(clock, device)
    features = encode(pixels)
    encoded = now(clock, device)
    shown, on_host, keys = pixels.cpu(), features.cpu(), [number.to_bytes(16, "big") for number in range(len(features))]
    with tempfile.TemporaryDirectory(dir=folder, prefix="manifest.json.probe-") as beside:
        own = FeatureFolder(Path(beside), {}, tuple(features.shape[1:]), features.dtype, gigabytes=2**20)
        before = clock()
        own.keep(keys, on_host)
        own.flush()
        written = clock()
        for image in shown:
            digest(image)
        found = [own.load(key, on_host[number]) for number, key in enumerate(keys)]
        read = now(clock, device)
        own.close()
    if not all(found):
        raise ValueError(f"train.feature_cache_dir {folder} does not give back what was written: is its disk full?")
    images = len(keys)
    return Measured((encoded - start) / images, (written - before) / images, (read - written) / images, own.size)


def now(clock: Callable[[], float], device: torch.device) -> float:
    """The time, when the device has done what was asked for."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return clock()


def verdict(measured: Measured, uses: float | None, kept: int, images: int) -> str:
    """In words. `uses` is how often the run sees an image, `kept` how many images the folder has, of `images` in the
    data (0: not known)."""
    times = (
        f"encode {1e3 * measured.encode:.3g} ms/image, read {1e3 * measured.read:.3g} ms/image, "
        f"{measured.size:,} bytes/image, {kept:,} images kept"
    )
    return f"{times}; {conclusion(measured, uses, min(1.0, kept / images) if images else float(kept > 0))}"


def conclusion(measured: Measured, uses: float | None, share: float) -> str:
    """`share` of the images are there already: those need not be written, and are read the first time too."""
    gain = measured.encode - measured.read
    if gain <= 0:
        return "does not pay: reading is no faster than encoding"
    if uses is None:
        return "pays where an image is seen again (how often a stream shows one is not known)"
    if share == 0 and uses <= 1:
        return "does not pay in this run, which sees an image once; a later run over the same images would read them"
    saved = uses * gain * share + (1 - share) * (max(0.0, uses - 1) * gain - measured.write)
    if saved <= 0:
        return f"does not pay in {uses:.3g} epochs: writing costs {1e3 * measured.write:.3g} ms/image"
    since = "the first" if share else "the second"
    return f"pays from {since} epoch on: about {1e3 * saved:.3g} ms/image saved in {uses:.3g} epochs"
