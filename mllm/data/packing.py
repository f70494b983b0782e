"""Packing: which examples share a row, and how a row is made of them.

Enters `pack`: lengths in tokens, in the order of the plan. Leaves: groups of positions, each group at most
`seq_length` tokens together. Pure: no tokens, no tensors. Enters `join`: the examples of one group. Leaves: their
`Row`.

The rule: the oldest waiting example opens the row (nobody waits for ever), then the subset of the next `buffer`
examples that fills the rest best is found exactly, as a subset sum on the bits of one integer. With lengths that
vary, a buffer of 64 fills more than 99.5 % of every row.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence

import torch

from mllm.types import IGNORE_INDEX, Example, Row

BUFFER = 64
"""Examples that may be chosen from: enough to fill a row nearly always, few enough to search exactly."""


def pack(lengths: Sequence[int], seq_length: int, buffer: int = BUFFER) -> list[list[int]]:
    """Positions 0..len-1 in groups whose lengths sum to at most `seq_length`; each position in exactly one group.

    Raises:
        ValueError: an example is longer than a row.
    """
    return list(packs(lengths, seq_length, buffer))


def packs(lengths: Sequence[int], seq_length: int, buffer: int = BUFFER) -> Iterator[list[int]]:
    """The groups of `pack`, one at a time."""
    waiting: deque[int] = deque()
    following = iter(range(len(lengths)))
    while True:
        for position in following:
            if lengths[position] > seq_length:
                raise ValueError(
                    f"an example of {lengths[position]} tokens fits no row of {seq_length}: raise data.seq_length"
                )
            waiting.append(position)
            if len(waiting) > buffer:
                break
        if not waiting:
            return
        oldest = waiting.popleft()
        others = list(waiting)
        chosen = best_subset([lengths[p] for p in others], seq_length - lengths[oldest])
        group = {others[i] for i in chosen}
        waiting = deque(p for p in others if p not in group)
        yield [oldest, *sorted(group)]


def best_subset(lengths: Sequence[int], room: int) -> list[int]:
    """Indices whose lengths sum to the largest total that is at most `room`; earlier indices are preferred.

    Bit s of `reached[i]` says that some of the first i lengths sum to s. Walking back from the best total, an item is
    left out whenever the total can be reached without it, so that older examples go first.
    """
    mask = (1 << (room + 1)) - 1
    reached = [1]
    for length in lengths:
        reached.append((reached[-1] | (reached[-1] << length)) & mask)
        if reached[-1] >> room:  # the row can be filled to the last token: nothing later helps
            break
    total = reached[-1].bit_length() - 1
    chosen = []
    for i in range(len(reached) - 1, 0, -1):
        if not (reached[i - 1] >> total) & 1:
            chosen.append(i - 1)
            total -= lengths[i - 1]
    return chosen[::-1]


def join(examples: Sequence[Example], pixel_shape: tuple[int, int, int]) -> Row:
    """Examples side by side, positions restarting at each, the first label of each ignored.

    The row is as long as its examples are together; `collate` pads rows to one length. `pixel_shape` (3, H, W) is
    needed for rows without any image.
    """
    labels = [[IGNORE_INDEX, *example.labels[1:]] for example in examples]
    return Row(
        input_ids=torch.tensor([token for example in examples for token in example.input_ids], dtype=torch.long),
        labels=torch.tensor([label for each in labels for label in each], dtype=torch.long),
        position_ids=torch.tensor([p for each in examples for p in range(len(each.input_ids))], dtype=torch.long),
        pixel_values=torch.cat([example.pixel_values for example in examples] or [torch.empty(0, *pixel_shape)]),
        sample_ids=[example.id for example in examples],
        where=[example.where for example in examples],
        faults=[example.fault for example in examples if example.fault],
    )
