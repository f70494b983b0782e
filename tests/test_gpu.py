"""On a CUDA device: what the CPU tests prove in float32 holds in bfloat16 too, and a stage trains there."""

from __future__ import annotations

import pytest
import torch

from conftest import make_model, make_processor, make_sample
from mllm.data.collate import collate
from mllm.data.packing import join
from mllm.train.losses import NextToken, model_inputs
from mllm.types import Batch, Example

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
SHAPE = (3, 28, 28)


def batch_of(groups: list[list[Example]]) -> Batch:
    return collate([join(group, SHAPE) for group in groups], SHAPE)


def loss_and_gradient(model: torch.nn.Module, batches: list[Batch]) -> tuple[float, torch.Tensor]:
    objective = NextToken(model)
    objective.zero_grad()
    device = torch.device("cuda")
    loss = torch.stack([objective(**model_inputs(batch, device)) for batch in batches]).sum()
    loss.backward()
    return float(loss.detach()), torch.cat([p.grad.flatten().float() for p in model.connector.parameters()])


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_packed_equals_separate_in_bfloat16_on_the_device(family: str, attention: str) -> None:
    processor = make_processor()
    examples = [processor(make_sample(i, num_images=i % 3, turns=1 + i % 2)) for i in range(5)]
    model = make_model(family, attention).to("cuda", torch.bfloat16)
    packed_loss, packed = loss_and_gradient(model, [batch_of([examples])])
    separate_loss, separate = loss_and_gradient(model, [batch_of([[example]]) for example in examples])
    assert packed_loss == pytest.approx(separate_loss, rel=5e-3)
    assert torch.nn.functional.cosine_similarity(packed, separate, dim=0) > 0.99


def test_float32_loss_on_the_device_equals_the_loss_on_the_cpu() -> None:
    processor, model = make_processor(), make_model()
    batch = batch_of([[processor(make_sample(i)) for i in range(4)]])
    on_cpu = float(NextToken(model)(**model_inputs(batch, torch.device("cpu"))).detach())
    on_device, _ = loss_and_gradient(model.to("cuda"), [batch])
    assert on_device == pytest.approx(on_cpu, rel=1e-4)
