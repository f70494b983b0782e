"""The host waits for the device twice a step, however many samples, micro-batches and layers there are: for the losses,
and for the norm of the gradient. Nothing inside of the model makes it wait."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode

from conftest import make_model, make_processor, make_sample
from mllm.data.collate import collate
from mllm.data.packing import join
from mllm.models.multimodal import MultimodalLM
from mllm.models.packed.boundaries import boundaries
from mllm.models.packed.function import register
from mllm.train.inputs import inputs_of
from mllm.train.losses import NextToken, model_inputs
from mllm.train.step import optimise
from mllm.train.trainable import LearningRates, Lora, choose_trainable, parameter_groups, set_mode
from mllm.types import Batch

CPU, SHAPE = torch.device("cpu"), (3, 28, 28)
register()  # makes the kernels' names known


def batch_of(samples: int, images: int = 1) -> Batch:
    examples = [make_processor()(make_sample(seed, images)) for seed in range(samples)]
    return collate([join(examples, SHAPE)], SHAPE)


def without_values(model: nn.Module, inputs: dict[str, Any], mode: FakeTensorMode) -> dict[str, Any]:
    """Tensors that have a shape and nothing in them: whoever looks for a number in one gets an error."""

    def emptied(value: Any) -> Any:
        if isinstance(value, Tensor):
            with mode:
                return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype)
        return type(value)(*map(emptied, value)) if isinstance(value, tuple) else value

    for module in model.modules():
        for name, weight in module._parameters.items():
            if weight is not None:
                module._parameters[name] = nn.Parameter(emptied(weight), weight.requires_grad)
        for name, buffer in module._buffers.items():
            module._buffers[name] = emptied(buffer)
    return {name: emptied(value) for name, value in inputs.items()}


CASES = {
    "align": (LearningRates(connector=1e-3), None, 1),
    "text only": (LearningRates(connector=1e-3), None, 0),
    "lora": (LearningRates(connector=1e-3, llm=1e-3), Lora(rank=2), 1),
    "all three": (LearningRates(1e-3, 1e-3, 1e-3), None, 1),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("family", ["mistral", "gemma3"])
def test_forward_and_backward_read_no_number_of_any_tensor(family: str, case: str) -> None:
    """On tensors without values, where each search and each `.item()` is an error."""
    rates, lora, images = CASES[case]
    model, batch = make_model(family, "mllm_varlen"), batch_of(3, images)
    choose_trainable(model, rates, lora)
    given = {**inputs_of(batch, CPU, model, "sqrt"), "samples": boundaries(batch["position_ids"])}
    mode = FakeTensorMode()
    inputs = without_values(model, given, mode)
    with mode:
        loss = NextToken(model.train())(**inputs)
        loss.backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert all(p.grad is not None and p.grad.shape == p.shape for p in trained)


def test_without_what_the_host_knows_the_model_has_to_ask() -> None:
    """Guards the test above: these are the errors that it would end with."""
    model, batch = make_model(attention="mllm_varlen"), batch_of(3)
    mode = FakeTensorMode()
    inputs = without_values(model, model_inputs(batch, CPU), mode)
    with mode, pytest.raises((DataDependentOutputException, DynamicOutputShapeException)):
        NextToken(model)(**inputs)


@contextmanager
def reads(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """How often what is on the device is brought to the host: here all lies on the host, so that who does it is
    counted by its way of doing it."""
    found: list[str] = []
    cpu, to_number, to_list = Tensor.cpu, Tensor.__float__, Tensor.tolist

    def counted(name: str, method: Any) -> Any:
        def called(tensor: Tensor, *rest: Any) -> Any:
            found.append(name)
            return method(tensor, *rest)

        return called

    with monkeypatch.context() as patch:
        for name, method in (("cpu", cpu), ("__float__", to_number), ("tolist", to_list)):
            patch.setattr(Tensor, name, counted(name, method))
        yield found


def step_reads(monkeypatch: pytest.MonkeyPatch, samples: int, parts: int, layers: int) -> list[str]:
    accelerator, model = Accelerator(cpu=True), made(layers)
    groups = parameter_groups(model, LearningRates(connector=1e-3), 0.0)
    objective, optimizer = accelerator.prepare(NextToken(model), torch.optim.SGD(groups))
    block = [batch_of(samples) for _ in range(parts)]
    optimise(accelerator, objective, optimizer, block, 1.0)
    with reads(monkeypatch) as found:
        optimise(accelerator, objective, optimizer, block, 1.0)
    return found


def made(layers: int) -> MultimodalLM:
    model = make_model(num_hidden_layers=layers)
    choose_trainable(model, LearningRates(connector=1e-3), None)
    set_mode(model)
    return model


def test_a_step_reads_as_often_however_many_samples_and_layers_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    small, large = step_reads(monkeypatch, 2, 2, 2), step_reads(monkeypatch, 6, 2, 4)
    assert sorted(small) == sorted(large)
    assert small.count("cpu") == 1
