"""The route of one image, disk to loss: eight rooms, the shape at every door (the README's table, walked).

B rows, S tokens of a row, T tokens of an example, N images, P patches, V visual tokens, Dv D widths, K supervised.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from conftest import make_model, make_processor, write_llava
from mllm.data.collate import collate
from mllm.data.formats.llava import LlavaSource
from mllm.data.index import build_index
from mllm.data.packing import join
from mllm.data.plan import Plan
from mllm.models.connectors import ConnectorConfig, LinearConnector, MLPConnector, QFormerConnector
from mllm.train.losses import NextToken, model_inputs, num_supervised, supervised
from mllm.types import IGNORE_INDEX, Sample

PIXELS, P, Dv, D, SEQ_LENGTH, VOCABULARY = (3, 28, 28), 4, 24, 32, 96, 384
QFORMER = QFormerConnector(num_queries=3, hidden_size=16, num_layers=2, num_heads=2)


@pytest.mark.parametrize("connector", [LinearConnector(), MLPConnector(), QFORMER], ids=lambda c: c.type)
def test_route_of_one_image_has_the_promised_shape_at_every_door(tmp_path: Path, connector: ConnectorConfig) -> None:
    V = connector.num_tokens(P)
    model, processor = make_model(connector=connector), make_processor(V)

    # 1 formats: one record -> Sample
    source = LlavaSource(path=write_llava(tmp_path, records=6))
    samples = list(source.read())
    assert all(isinstance(sample, Sample) for sample in samples)
    assert [sample.id for sample in samples] == [f"r{i}" for i in range(6)]
    assert [len(sample.images) for sample in samples] == [1] * 6

    # 2 processor: Sample -> Example, each placeholder V slots wide
    examples = [processor(sample) for sample in samples]
    for example in examples:
        assert (example.pixel_values.dtype, example.pixel_values.shape) == (torch.uint8, (1, *PIXELS))
        assert len(example.input_ids) == len(example.labels)
        assert example.input_ids.count(processor.image_token_id) == V
        assert example.labels[0] == IGNORE_INDEX

    # 3 packing: Examples -> Row, positions restart at each
    index = build_index([source], processor, SEQ_LENGTH, progress=False)
    assert index.length.tolist() == [len(example.input_ids) for example in examples]
    plan = Plan.from_lengths(index.length, SEQ_LENGTH, rows_per_step=2)
    groups = plan.rows(0)
    rows = [join([examples[i] for i in group], PIXELS) for group in groups]
    for row, group in zip(rows, groups, strict=True):
        assert (
            row.input_ids.shape == row.labels.shape == row.position_ids.shape == (sum(index.length[i] for i in group),)
        )
        assert int((row.position_ids == 0).sum()) == len(group)
        assert row.pixel_values.shape == (len(group), *PIXELS)
        assert len(row.input_ids) <= SEQ_LENGTH

    # 4 collate: rows -> Batch
    batch = collate(rows, PIXELS)
    B, S, N = 2, max(len(row.input_ids) for row in rows), sum(map(len, groups))
    S += -S % 8
    assert batch["input_ids"].shape == batch["labels"].shape == batch["position_ids"].shape == (B, S)
    assert (batch["pixel_values"].dtype, batch["pixel_values"].shape) == (torch.uint8, (N, *PIXELS))
    assert batch["num_images"] == N

    # 5 vision encoder, frozen: pixels, normalised here -> patch features
    model.vision_encoder.requires_grad_(False)
    features = model.vision_encoder(batch["pixel_values"])
    assert features.shape == (N, P, Dv)
    assert not features.requires_grad

    # 6 connector: patch features -> visual tokens
    visual_tokens = model.connector(features)
    assert visual_tokens.shape == (N, V, D)

    # 7 multimodal: embeddings with visual tokens in their slots -> hidden states
    embeddings = model.embed(batch["input_ids"], visual_tokens, N)
    slots = batch["input_ids"] == processor.image_token_id
    assert embeddings.shape == (B, S, D)
    assert torch.equal(embeddings[slots], visual_tokens.flatten(0, 1))
    inputs = model_inputs(batch, torch.device("cpu"))
    labels = inputs.pop("labels")
    hidden_states = model(**inputs)
    assert hidden_states.shape == (B, S, D)

    # 8 losses: hidden states at supervised positions -> summed loss and count
    where, targets = supervised(labels)
    K = num_supervised(batch)
    assert where.shape == (B, S - 1)
    assert targets.shape == (K,)
    assert sum(index.supervised[i] for group in groups for i in group) == K
    assert model.logits(hidden_states[:, :-1][where]).shape == (K, VOCABULARY)
    loss = NextToken(model)(labels=labels, **inputs)
    assert loss.shape == ()
    assert float(loss.detach()) / K == pytest.approx(5.95, abs=0.3)  # about ln 384: nothing is learned yet
    loss.backward()
    assert all(p.grad is not None for p in model.connector.parameters())
