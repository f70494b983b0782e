"""Cross-entropy and its gradient in one pass over the logits and one back, in the place of the logits.

Enters: logits [C, V] in any float type, targets, weights. Leaves: the loss of each row in float32; the logits are
overwritten by their gradient. Eager torch reads and writes as many logits some eight times, in float32: on an H200,
head and loss of 4,096 rows of 151,936 words and width 1,536 take 6.3 ms with it and 13.0 without, forward and backward.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096
"""Words that a program takes at a time; between 2,048 and 32,768 the time hardly differs (H200)."""


def entropy_in_place(logits: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """[C, V], [C], [C] -> losses [C] float32, unweighted; `logits` become the gradient of their weighted sum."""
    assert logits.stride(1) == 1, logits.stride()
    losses = torch.empty(len(logits), device=logits.device, dtype=torch.float32)
    if len(logits):
        with torch.cuda.device(logits.device):
            rows_of_logits[(len(logits),)](
                logits, targets, weights, losses, logits.shape[1], logits.stride(0), BLOCK=BLOCK, num_warps=8
            )
    return losses


@triton.jit
def rows_of_logits(logits, targets, weights, losses, words, stride, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """One program a row: the sum of exponentials beside a running maximum (Milakov and Gimelshein 2018, arXiv
    1805.02867), then probability less one at the target, times the weight."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    target = tl.load(targets + row)
    weight = tl.load(weights + row)
    said = tl.load(logits + target).to(tl.float32)
    most = -float("inf")
    total = 0.0
    for start in range(0, words, BLOCK):
        here = start + tl.arange(0, BLOCK)
        value = tl.load(logits + here, mask=here < words, other=-float("inf")).to(tl.float32)
        more = tl.maximum(most, tl.max(value, 0))
        total = total * tl.exp(most - more) + tl.sum(tl.exp(value - more), 0)
        most = more
    log_sum = most + tl.log(total)
    tl.store(losses + row, log_sum - said)
    for start in range(0, words, BLOCK):
        here = start + tl.arange(0, BLOCK)
        value = tl.load(logits + here, mask=here < words, other=-float("inf")).to(tl.float32)
        gradient = (tl.exp(value - log_sum) - tl.where(here == target, 1.0, 0.0)) * weight
        tl.store(logits + here, gradient.to(logits.dtype.element_ty), mask=here < words)
