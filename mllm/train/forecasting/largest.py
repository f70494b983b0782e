"""The largest micro-batch of a run: the one whose memory decides.

Enters: the counts of an index, or of the first samples of a stream, and the plan. Leaves: the `Shape` of a micro-batch
that no other will exceed by much. Rows come sorted by their cost within a step, so that the heaviest rows do meet in
one micro-batch. Of a large index the first windows of the plan are looked at: 65 thousand samples.

B rows, S tokens of a row, N images, K supervised positions.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from mllm.data.collate import MULTIPLE
from mllm.data.index import Index
from mllm.data.plan import SHOWN_WINDOWS, Plan
from mllm.data.streams.batches import Look
from mllm.data.streams.plan import StreamPlan
from mllm.models.multimodal import MultimodalLM
from mllm.train.forecasting.shadow import Shape

Rows = list[list[int]]


def largest(model: MultimodalLM, known: Index | Look, plan: Plan | StreamPlan, rows_per_micro_batch: int) -> Shape:
    """The shape of the micro-batch that needs most memory: of the longest rows, of those with most images and of those
    with most supervised tokens, the heaviest."""
    columns = [known.length, known.tiles, known.supervised]
    rows = planned_rows(plan) if isinstance(plan, Plan) else dense_rows(columns, plan)
    counts = np.array([[column[row].sum() for column in columns] for row in rows])  # [rows, 3]
    shapes = {shape_of(counts[np.argsort(-counts[:, by], kind="stable")[:rows_per_micro_batch]]) for by in range(3)}
    return max(sorted(shapes, key=str), key=lambda shape: weight(model, shape))


def planned_rows(plan: Plan) -> Rows:
    """The rows of the first windows that hold any."""
    epoch, _ = plan.windows.after(0, -1)
    windows = range(min(SHOWN_WINDOWS, plan.windows.number(epoch)))
    return [row for window in windows for row in plan.windows.rows(epoch, window)]


def dense_rows(columns: Iterable[np.ndarray], plan: StreamPlan) -> Rows:
    """Of a stream, whose rows nobody knows: rows of the samples that hold most for their length. Each sample comes in
    as often as it fits, since more of its kind may follow."""
    length, *held = columns
    if not plan.packing:
        return [[number] for number in range(len(length))]
    densest = [int(np.argmax(column / length)) for column in held] + [int(np.argmax(length))]
    return [[number] * max(1, plan.seq_length // int(length[number])) for number in densest for _ in range(2)]


def shape_of(counts: np.ndarray) -> Shape:
    """Rows stacked as `collate` stacks them."""
    tokens, images, supervised = counts[:, 0], int(counts[:, 1].sum()), int(counts[:, 2].sum())
    return Shape(len(counts), int(-(-tokens.max() // MULTIPLE) * MULTIPLE), images, supervised)


def weight(model: MultimodalLM, shape: Shape) -> float:
    """Rough bytes, to tell which of a few shapes is the heaviest: some 16 numbers a token, layer and unit of width,
    three a supervised token and word, and what the encoder holds at a time of an image."""
    config, encoder = model.llm.config.get_text_config(), model.vision_encoder
    token = 16 * config.hidden_size * config.num_hidden_layers
    image = 12 * encoder.num_patches * encoder.width
    return shape.rows * shape.length * token + shape.images * image + 3 * shape.supervised * config.vocab_size
