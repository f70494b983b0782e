"""One optimiser step over the micro-batches of this rank.

Enters: the wrapped objective and this rank's block of micro-batches. Leaves: updated weights and the step's numbers.

The weights of all supervised tokens of the global batch are summed first; every micro-batch then contributes its
weighted sum divided by that one number. Splitting the step otherwise (ranks, accumulation, packing, halves of a
micro-batch that memory had no room for) changes nothing but rounding.

Two small sums go over the ranks: what the step weighs, before it, and its loss with the word whether memory sufficed,
before the gradients travel. From the second every rank knows alike whether the step counts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from mllm.train import engine
from mllm.train.engines import zero
from mllm.train.engines.ddp import average_gradients
from mllm.train.guard import Guard
from mllm.train.halving import Room, stop_out_of_memory
from mllm.train.inputs import StepInputs
from mllm.train.losses import NextToken, Reduction, weight_sum
from mllm.train.sums import Sums, global_sums
from mllm.types import Batch

if TYPE_CHECKING:
    from accelerate import Accelerator

Beat = Callable[..., None]


def mute(phase: str, batch: Batch | None = None, slow: bool = False) -> None:
    """Nobody watches."""


def optimise(
    accelerator: Accelerator,
    objective: nn.Module,
    optimizer: torch.optim.Optimizer,
    block: Sequence[Batch],
    max_grad_norm: float,
    reduction: Reduction = "token",
    sources: Sequence[str] = (),
    guard: Guard | None = None,
    room: Room | None = None,
    beat: Beat = mute,
) -> dict[str, Any]:
    """Forward, backward, clip, update.

    `sources` names the sources, by their numbers in the batches; `guard` may refuse the update; `room` remembers what
    fits in memory; `beat` is told each phase as it begins.

    Returns:
        what `Sums.numbers` tells (loss per unit of weight, supervised tokens, images, the loss of each source), and the
        norm of the gradient before clipping.

    Raises:
        ValueError: from the model, with the samples of the micro-batch named; or a single row does not fit in memory.
    """
    room = room or Room()
    parts = room.cut(block)
    beat("summing the weights")
    mine = [sum(weight_sum(batch, reduction) for batch in parts), float(room.untried(parts))]
    weight, untried = global_sums(accelerator, mine)
    attempt = Attempt(accelerator, objective, reduction, weight or 1.0, sources, guard, beat)  # no token, no loss
    while not attempt.succeeds(parts, bool(untried)):
        optimizer.zero_grad(set_to_none=True)
        room.halve(accelerator, parts)
        parts, untried = room.cut(block), 1.0
    room.fits(parts)
    beat("updating the weights")
    # DeepSpeed has clipped and stepped by now: it tells the norm, and what follows does nothing
    grad_norm = engine.clip(accelerator, objective, max_grad_norm or math.inf)
    if not (guard and guard.refuses(attempt.numbers["loss"], grad_norm)):
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return {**attempt.numbers, "grad_norm": grad_norm}


class Attempt:
    """One try at the gradients of a step; another follows, with smaller micro-batches, where memory ran out."""

    def __init__(
        self,
        accelerator: Accelerator,
        objective: nn.Module,
        reduction: Reduction,
        total: float,
        sources: Sequence[str],
        guard: Guard | None,
        beat: Beat,
    ) -> None:
        self.accelerator, self.objective, self.reduction = accelerator, objective, reduction
        losses = next(module for module in objective.modules() if isinstance(module, NextToken))
        self.model, self.joint = losses.model, losses.joint
        self.total, self.sources, self.guard, self.beat = total, sources, guard, beat
        # DDP and ZeRO average gradients over ranks: the world size makes a sum of it
        self.scale = accelerator.num_processes / total
        self.zero = bool(zero.stage(accelerator))
        self.is_ddp = isinstance(objective, DistributedDataParallel)
        if isinstance(objective, DistributedDataParallel):
            # the first forward pass of a step would send all buffers: constants here, and a rank may have to step back
            objective.broadcast_buffers = False
        self.is_alone = accelerator.distributed_type.value == "NO"
        self.numbers: dict[str, Any] = {}
        self.too_large: list[str] = []

    def succeeds(self, parts: Sequence[Batch], untried: bool) -> bool:
        """Compute all micro-batches. Every rank gives the same answer.

        DDP sends gradients while the last backward pass runs, when no rank can leave it any more. Where a rank has
        a micro-batch larger than all before, each computes by itself, and the gradients travel afterwards.
        """
        self.found: list[Found] = []
        self.rows_too_many = 0
        self.inputs = StepInputs(self.accelerator, self.model, parts, self.reduction)
        apart = self.is_alone or (self.is_ddp and untried)
        self.compute(parts if apart else parts[:-1])
        last = None
        if not apart and not self.rows_too_many:
            with self.accelerator.no_sync(self.objective) if self.is_ddp else nullcontext():
                last = self.try_forward(parts[-1])
        if not self.agreed():
            return False
        if last is not None:
            self.last_backward(last, parts[-1])
        elif self.is_ddp:
            self.beat("sending the gradients")
            average_gradients(self.objective)
        return True

    def compute(self, parts: Sequence[Batch]) -> None:
        """Forward and backward on this rank alone, up to where memory runs out."""
        for batch in parts:
            with nullcontext() if self.zero else self.accelerator.no_sync(self.objective):
                loss = self.try_forward(batch)
                if loss is None or not self.try_backward(loss, batch):
                    return

    def try_forward(self, batch: Batch) -> torch.Tensor | None:
        """The weighted sum of one micro-batch; None where memory ran out. An error names whose it is."""
        self.beat("forward", batch)
        try:
            loss, losses = self.objective(**self.inputs.next(), each=True, upstream=self.scale)
            self.found.append((batch, loss.detach(), losses))
            return loss
        except torch.OutOfMemoryError as error:
            self.ran_out(batch, error)
        except ValueError as error:
            raise ValueError(f"{error}. In the micro-batch of {', '.join(batch['where'])}") from error
        return None

    def try_backward(self, loss: torch.Tensor, batch: Batch) -> bool:
        try:
            self.backward(loss, is_last=False)
            return True
        except torch.OutOfMemoryError as error:
            self.ran_out(batch, error)
        return False

    def last_backward(self, loss: torch.Tensor, batch: Batch) -> None:
        """That in which the gradients travel, so that memory must suffice."""
        try:
            with self.accelerator.trigger_sync_in_backward(self.objective):  # of DDP; a forward pass must not begin it
                self.backward(loss, is_last=True)
        except torch.OutOfMemoryError as error:
            stop_out_of_memory(len(batch["input_ids"]), batch["where"], error)

    def backward(self, loss: torch.Tensor, is_last: bool) -> None:
        self.beat("backward")
        zero.backward(self.accelerator, loss * self.scale, is_last)

    def ran_out(self, batch: Batch, error: torch.OutOfMemoryError) -> None:
        """Remember it; stop at once where the other ranks are in the middle of an exchange with this one."""
        self.rows_too_many, self.too_large = len(batch["input_ids"]), batch["where"]
        if self.joint:  # halves would have other negatives, and other ranks wait for these rows
            raise ValueError(
                f"out of memory with {self.rows_too_many} rows that are compared with each other, in the micro-batch "
                f"of {', '.join(batch['where'])}: lower train.rows_per_micro_batch"
            ) from error
        if not self.is_alone and not self.is_ddp:
            stop_out_of_memory(self.rows_too_many, batch["where"], error)

    def agreed(self) -> bool:
        """Sum the losses over the ranks; False where memory ran out on one of them.

        Raises:
            ValueError: there a single row was too much.
        """
        sums = Sums(self.sources)
        found = on_host(self.found)
        for batch, loss, losses in found:
            sums.add(batch, loss, losses)
        self.beat("summing the loss")
        failed = [float(self.rows_too_many > 0), float(self.rows_too_many == 1)]
        ran_out, hopeless, *summed = global_sums(self.accelerator, [*failed, *sums.values()])
        if hopeless:
            from accelerate.utils import gather_object

            stop_out_of_memory(1, gather_object(self.too_large if self.rows_too_many == 1 else []))
        self.numbers = sums.numbers(summed, self.total)
        if self.guard and not ran_out:
            self.guard.look([(batch, float(loss), weight_sum(batch, self.reduction)) for batch, loss, _ in found])
            if self.zero and self.guard.refuses(self.numbers["loss"]):
                self.scale = math.nan  # DeepSpeed steps in the last backward pass, and not where the gradient is nan
        return not ran_out


Found = tuple[Batch, torch.Tensor, torch.Tensor]
"""A micro-batch, its weighted sum, and the loss of each supervised token [K]."""


def on_host(found: Sequence[Found]) -> list[Found]:
    """The same in float64, by one copy: each copy would wait for the device."""
    if not found:
        return []
    sizes = [1 + len(losses) for _, _, losses in found]
    flat = torch.cat([part.double() for _, loss, losses in found for part in (loss.view(1), losses)]).cpu()
    parts = flat.split(sizes)
    return [(batch, part[0], part[1:]) for (batch, _, _), part in zip(found, parts, strict=True)]
