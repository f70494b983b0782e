"""The head and its cross-entropy as one operation, a chunk of rows at a time.

Enters: hidden states [K, D] of supervised positions, the head, what each position shall say and weigh. Leaves: the
weighted sum of the losses, and each of them. The gradient of the states, and of a head that trains, is computed in
the same go, so that no logits wait for the backward pass; a frozen head has no gradient at all.

On a CPU it rounds as the plain way does (the head's own call, then cross-entropy in float32): where the rows fit in
one chunk, and the gradient of the sum is known beforehand, the bits are the same. That way stays for heads that are
no plain `Linear` in one piece here: an adapter or four bits on it, ZeRO stage 3 and FSDP2, which put it together
around its call.

K supervised positions, C of a chunk, D width of the LLM, V vocabulary.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, linear

from mllm.models.head import BEHIND, scaled
from mllm.models.multimodal import MultimodalLM

ROWS = 4096
"""Rows of a chunk at most, and half as many at least where there are several: fewer leave a GPU's matrix units idle."""
FLOAT32_BYTES = 2**28
"""Of logits in float32 at a time: a chunk in half precision never exists in full precision as a whole."""


def head_loss(
    model: MultimodalLM, states: Tensor, targets: Tensor, weights: Tensor, upstream: float = 1.0
) -> tuple[Tensor, Tensor]:
    """[K, D], [K], [K] -> the weighted sum, float32 and differentiable, and the loss of each position [K] float32.

    `upstream` is the gradient that the sum will be given, where that is known: computed with it at once, the gradient
    of the states rounds as in the plain way. Any other gives the same but for rounding.
    """
    head = model.llm.get_output_embeddings()
    if not is_plain(head):
        losses = cross_entropy(model.logits(states).float(), targets, reduction="none")  # [K]
        return (losses * weights).sum(), losses.detach()
    return HeadLoss.apply(  # type: ignore[no-any-return]
        states, head.weight, head.bias, targets, weights, model.llm.config, upstream, torch.is_grad_enabled()
    )


def is_plain(head: Any) -> bool:
    """Is it a `Linear` whose weight lies here whole, and which nobody wants to hear called?"""
    hooked = head._forward_hooks or head._forward_pre_hooks or head._backward_hooks or head._backward_pre_hooks
    sharded = hasattr(head.weight, "ds_id") or hasattr(head.weight, "full_tensor")
    return type(head) is nn.Linear and not hooked and not sharded


class HeadLoss(torch.autograd.Function):
    """See `head_loss`; the gradients of a loss are known when the loss is, so forward computes both."""

    @staticmethod
    def forward(
        ctx: Any,
        states: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        weights: Tensor,
        config: Any,
        upstream: float,
        with_gradient: bool,
    ) -> tuple[Tensor, Tensor]:
        dtype = computed_in(states)
        rows, matrix, added = states.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
        wanted = [with_gradient and needed for needed in ctx.needs_input_grad[:3]]
        of_states = torch.empty_like(rows) if wanted[0] else None
        of_weight = of_bias = None
        losses = torch.empty(len(rows), device=rows.device, dtype=torch.float32)
        for part in chunks(len(rows)):
            logits = linear(rows[part], matrix, added)  # [C, V]
            losses[part] = to_gradient(logits, targets[part], weights[part] * upstream, config, any(wanted))
            if of_states is not None:
                torch.mm(logits, matrix, out=of_states[part])
            if wanted[1]:
                of_weight = summed(of_weight, logits.t() @ rows[part])
            if wanted[2]:
                of_bias = summed(of_bias, logits.sum(0))
            del logits  # before those of the next chunk are made
        ctx.upstream, ctx.dtypes = upstream, [part if part is None else part.dtype for part in (states, weight, bias)]
        ctx.save_for_backward(of_states, of_weight, of_bias)
        ctx.mark_non_differentiable(losses)
        return (losses * weights).sum(), losses

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        factor = gradients[0] / ctx.upstream  # 1 where it is the one that was told
        found = [
            None if tensor is None else tensor.float().mul_(factor).to(dtype)  # of float32 in place
            for tensor, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        return *found, None, None, None, None, None


def computed_in(states: Tensor) -> torch.dtype:
    """What autocast would multiply them in."""
    kind = states.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else states.dtype


def summed(before: Tensor | None, more: Tensor) -> Tensor:
    """In float32."""
    return more.float() if before is None else before.add_(more)


def chunks(rows: int) -> list[slice]:
    """Alike but for one row, as few as `ROWS` allows."""
    number = max(1, -(-rows // ROWS))
    size = max(1, -(-rows // number))
    return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]


def to_gradient(logits: Tensor, targets: Tensor, weights: Tensor, config: Any, wanted: bool) -> Tensor:
    """The loss of each row [C] float32; where `wanted`, its weighted gradient takes the place of `logits` [C, V]."""
    plain = not any(getattr(config, name, None) for name in BEHIND)
    # a tensor without data, of which memory is foretold, is of another type
    if wanted and plain and logits.is_cuda and type(logits) is Tensor and (in_place := kernel(logits.device)):
        return in_place(logits, targets, weights)
    size = max(1, FLOAT32_BYTES // (4 * logits.shape[1]))
    losses = [logits.new_zeros(0, dtype=torch.float32)]
    for raw, target, weight in zip(logits.split(size), targets.split(size), weights.split(size), strict=True):
        with torch.set_grad_enabled(wanted):
            raw.requires_grad_(wanted)
            own = cross_entropy(scaled(raw, config).float(), target, reduction="none")
        losses.append(own.detach())
        if wanted:
            raw.detach().copy_(torch.autograd.grad(own, raw, weight)[0])
    return torch.cat(losses)


@cache
def kernel(device: torch.device) -> Callable[[Tensor, Tensor, Tensor], Tensor] | None:
    """Triton's, where there is one: its first use needs a C compiler."""
    if find_spec("triton") is None:
        return None
    try:
        from mllm.train.kernels.entropy import entropy_in_place

        one = torch.zeros(1, 8, device=device), torch.zeros(1, dtype=torch.int64, device=device)
        entropy_in_place(*one, torch.ones(1, device=device))
    except torch.OutOfMemoryError:
        raise  # says nothing of the kernel
    except Exception as error:  # each missing piece ends in an error of its own
        warnings.warn(f"the loss is computed without Triton, in more memory and time: {error}", stacklevel=2)
        return None
    return entropy_in_place
