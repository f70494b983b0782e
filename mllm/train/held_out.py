"""Held-out losses while a run goes on, and a warning where the model does not look at its images.

Enters: the index of what is held out, the model as it is wrapped. Leaves: three losses every `train.eval_every` steps
and at the end (see `gap`). The run is the same with and without: weights, modes, random state and the kept features
are afterwards what they were. Every rank computes as many batches, and all sums are over all ranks.

K supervised tokens of a micro-batch, N images.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from mllm.data.held_out import Asked, HeldOutBatches
from mllm.data.index import Index
from mllm.data.loader import DataConfig, Share
from mllm.data.processor import Processor
from mllm.models.multimodal import MultimodalLM
from mllm.train.losses import model_inputs, owners
from mllm.train.step import Beat, mute
from mllm.train.sums import global_sums
from mllm.train.watching.gap import HeldOutLoss, conclude, terms

if TYPE_CHECKING:
    from accelerate import Accelerator

    from mllm.train.settings import TrainConfig

GREY = 128
"""Of a blank image whose pixels are uint8."""
WARNING = (
    "warning: the model does not look at the images: held-out loss {loss:.4f} with the right ones, {shuffled:.4f} with "
    "those of other samples, {blank:.4f} with blank ones. Does the connector train, and do its visual tokens arrive?"
)


def check(data: DataConfig, train: TrainConfig) -> None:
    """Stop where nothing is there to ask.

    Raises:
        ValueError: says what to set.
    """
    if train.eval_every and not data.held_out:
        raise ValueError(
            "train.eval_every without data.held_out: give it a number of samples to take out, or a list of sources"
        )


class HeldOut:
    """Asks the held-out samples when it is time; mute where there are none."""

    def __init__(
        self,
        accelerator: Accelerator,
        index: Index | None,
        processor: Processor,
        data: DataConfig,
        train: TrainConfig,
        last_step: int,
        say: Callable[[str], None] = print,
        beat: Beat = mute,
    ) -> None:
        """`say` prints a line, `beat` is told each micro-batch as it begins: there may be many."""
        check(data, train)
        assert index or not data.held_out, "data.held_out is set, but the index has none: see data/held_out.py"
        self.accelerator, self.say, self.beat, self.last_step = accelerator, say, beat, last_step
        self.every, self.num_workers = train.eval_every or last_step, data.num_workers
        self.warmed_up = train.warmup * last_step
        length = data.seq_length if train.compile else None
        share = Share(accelerator.process_index, accelerator.num_processes, train.rows_per_micro_batch, length)
        self.batches = HeldOutBatches(index, processor, data, share) if index else None

    def at(self, step: int, objective: nn.Module, model: MultimodalLM) -> dict[str, dict[str, float]]:
        """What the line of that step tells of it: nothing where it is not due. `step` steps are done."""
        if self.batches is None or (step % self.every and step != self.last_step):
            return {}
        found = self.ask(self.batches, objective, model)
        if found.looks is False and step > self.warmed_up:
            self.say(WARNING.format(**found.numbers()))
        return {"held_out": found.numbers()}

    def ask(self, batches: HeldOutBatches, objective: nn.Module, model: MultimodalLM) -> HeldOutLoss:
        """The three losses over all held-out samples."""
        sums = torch.zeros(11, dtype=torch.float64)
        with in_use(self.accelerator, objective, model):
            for asked in batches.read(self.num_workers):
                self.beat("asking held-out samples", asked.batch, slow=True)
                # the same on every rank: with one sharded weight, one forward pass more would wait for ever
                sums += torch.tensor(self.asked(objective, asked, three=batches.num_changed > 0), dtype=torch.float64)
        return conclude(global_sums(self.accelerator, sums.tolist()))

    def asked(self, objective: nn.Module, asked: Asked, three: bool) -> list[float]:
        """The sums of one micro-batch."""
        batch, owner, samples = asked.batch, owners(asked.batch), len(asked.changed)
        inputs = model_inputs(batch, self.accelerator.device)
        shown = [batch["pixel_values"], asked.borrowed, blank(batch["pixel_values"])] if three else []

        def losses(pixel_values: Tensor) -> Tensor:
            """[samples] float64, summed over the tokens of each."""
            pixels = pixel_values.to(self.accelerator.device, non_blocking=True)
            _, of_tokens = objective(**{**inputs, "pixel_values": pixels}, each=True)
            return owner.bincount(of_tokens.double().cpu(), samples)

        right, shuffled, none = map(losses, shown) if three else [losses(batch["pixel_values"])] * 3
        return terms(owner.bincount(None, samples).double(), right, shuffled, none, asked.changed)


def blank(pixel_values: Tensor) -> Tensor:
    """As many images [N, 3, H, W] without anything on them: mid grey, or the encoder's mean where it is subtracted."""
    return torch.full_like(pixel_values, GREY if pixel_values.dtype == torch.uint8 else 0)


@contextmanager
def in_use(accelerator: Accelerator, objective: nn.Module, model: MultimodalLM) -> Iterator[None]:
    """The model as it is when it is used (no dropout, no gradients), and afterwards all that it was."""
    modes = {module: module.training for module in objective.modules()}
    cache, model.feature_cache = model.feature_cache, None
    devices = [accelerator.device] if accelerator.device.type == "cuda" else []
    objective.eval()
    try:
        with torch.random.fork_rng(devices), torch.no_grad():
            yield
    finally:
        model.feature_cache = cache
        for module, mode in modes.items():
            module.training = mode
