"""Features of a frozen encoder that lie in a folder, brought to the device while the micro-batch before is computed.

Enters: the pixels [N, 3, H, W] of the micro-batches, on the host. Leaves: their features [N, P, Dv] on the device, bit
for bit those that the encoder gives for groups of `GROUP` images. A thread of its own digests the pixels of the
micro-batch that is next and reads what there is of it, into pinned memory where the device is a GPU; the copy waits
for nobody. What is missing is encoded, and written by the same thread.

N images, P patches, Dv width of the encoder.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from mllm.models.feature_cache import GROUP, digest
from mllm.models.feature_folder import FeatureFolder
from mllm.models.image_groups import Encode, filled_up
from mllm.types import Batch

WAITING = 8
"""Groups that may wait to be written; then the run waits for the disk, and not the computer's memory for the run."""


class Found(NamedTuple):
    """What the folder has of one micro-batch."""

    keys: list[bytes]
    features: Tensor
    """[N, P, Dv] on the host; of a missing image whatever was there."""
    missing: list[int]


class StoredFeatures:
    """A folder, and the thread that reads and writes it; in the place of a `FeatureCache`."""

    def __init__(self, folder: FeatureFolder, pin: bool) -> None:
        self.folder, self.pin = folder, pin
        # a new thread would stand on the first GPU, whichever is this rank's
        begin = partial(torch.cuda.set_device, torch.cuda.current_device()) if pin else None
        self.thread = ThreadPoolExecutor(1, "features", initializer=begin)
        self.begun: deque[tuple[Tensor, Future[Found]]] = deque(maxlen=2)
        self.writing: deque[Future[None]] = deque()

    def __call__(self, encode: Encode, pixel_values: Tensor) -> Tensor:
        """[N, 3, H, W] -> [N, P, Dv], all at once."""
        device = pixel_values.device
        send: Callable[[Tensor], Tensor] = lambda value: value.to(device)  # noqa: E731
        return self.step(encode, [pixel_values], send).take(len(pixel_values))

    def step(self, encode: Encode, pixels: Iterable[Tensor], send: Callable[[Tensor], Tensor]) -> StepFeatures:
        """The features of a step's micro-batches, one after the other."""
        return StepFeatures(self, encode, pixels, send)

    def one_ahead(self, micro_batches: Iterator[Batch], accumulation: int) -> Iterator[Batch]:
        """The same micro-batches; reading for the first of a step begins while the step before is computed."""
        number, waiting = 0, next(micro_batches, None)
        while waiting is not None:
            given, waiting, number = waiting, next(micro_batches, None), number + 1
            if waiting is not None and waiting["num_images"] and number % accumulation == 0:
                self.begun.append((waiting["pixel_values"], self.begin(waiting["pixel_values"])))
            yield given

    def begin(self, pixels: Tensor) -> Future[Found]:
        """Begin to read, unless that was done. The tensor is held, so that none passes for another."""
        return next((found for own, found in self.begun if own is pixels), None) or self.thread.submit(
            self.find, pixels
        )

    def find(self, pixels: Tensor) -> Found:
        """In the thread: what the folder has of these images."""
        keys = [digest(image) for image in pixels.cpu()]
        if any(key not in self.folder.places for key in keys):
            self.folder.refresh()
        features = torch.empty(len(keys), *self.folder.shape, dtype=self.folder.dtype, pin_memory=self.pin)
        missing = [at for at, key in enumerate(keys) if not self.folder.load(key, features[at])]
        return Found(keys, features, missing)

    def keep(self, keys: list[bytes], features: Tensor) -> None:
        """[n, P, Dv] on the device, to be written by and by."""
        if self.folder.ended:
            return
        while len(self.writing) >= WAITING:
            self.writing.popleft().result()
        self.writing.append(self.thread.submit(self.write, keys, *to_host(features, self.pin)))

    def write(self, keys: list[bytes], features: Tensor, wait: Callable[[], None]) -> None:
        """In the thread."""
        wait()
        self.folder.keep(keys, features)

    def finish(self) -> None:
        """Wait until all is written."""
        while self.writing:
            self.writing.popleft().result()


def to_host(features: Tensor, pin: bool) -> tuple[Tensor, Callable[[], None]]:
    """A copy that is on its way, in memory of its own; and what waits until it is there. Nothing here is written twice:
    torch takes pinned memory back when all copies from and to it are done."""
    on_host = torch.empty(features.shape, dtype=features.dtype, pin_memory=pin)
    on_host.copy_(features, non_blocking=True)
    if not pin:
        return on_host, lambda: None
    done = torch.cuda.Event(blocking=True)  # asleep, and not asking all the time
    done.record()
    return on_host, done.synchronize


class StepFeatures:
    """The features of the micro-batches of a step, each asked for once, in their order."""

    def __init__(
        self, stored: StoredFeatures, encode: Encode, pixels: Iterable[Tensor], send: Callable[[Tensor], Tensor]
    ) -> None:
        """`pixels` are those of each micro-batch that has any, on the host; `send` brings them to the device."""
        self.stored, self.encode, self.send = stored, encode, send
        self.waiting = deque(pixels)
        self.next: Future[Found] | None = None
        self.begin()

    def begin(self) -> None:
        self.next = self.stored.begin(self.waiting[0]) if self.waiting else None

    @torch.no_grad()
    def take(self, images: int) -> Tensor:
        """The features of the next micro-batch [images, P, Dv]."""
        assert self.next, "more images were asked for than the step has"
        found, pixels = self.next.result(), self.waiting.popleft()
        assert len(found.keys) == images, f"{images} images were asked for, the micro-batch has {len(found.keys)}"
        features = self.send(found.features)
        first = {found.keys[at]: at for at in reversed(found.missing)}
        encoded: dict[bytes, Tensor] = {}
        for group in torch.tensor(list(first.values()), dtype=torch.int64).split(GROUP) if first else ():
            keys = [found.keys[at] for at in group.tolist()]
            new = filled_up(self.encode, self.send(pixels[group]), GROUP)
            encoded.update(zip(keys, new, strict=True))
            self.stored.keep(keys, new)
        for at in found.missing:
            features[at] = encoded[found.keys[at]]
        self.begin()  # behind what is written, so that the next one finds it
        return features
