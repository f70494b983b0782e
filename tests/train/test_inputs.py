"""What is sent to a device in the middle of a step travels beside its work, and is not used before it is there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mllm.train import inputs
from mllm.train.inputs import StepInputs, copy_stream


class FakeStream:
    """Knows what it was told, in order."""

    def __init__(self, name: str, told: list[str]) -> None:
        self.name, self.told = name, told

    def wait_stream(self, other: FakeStream) -> None:
        self.told.append(f"{self.name} waits for {other.name}")


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What two streams are told, the computing one being current."""
    told: list[str] = []
    current = [FakeStream("computing", told)]

    @contextmanager
    def on(stream: FakeStream) -> Iterator[None]:
        current.append(stream)
        yield
        current.pop()

    def sent(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
        told.append(f"copy on {current[-1].name}")
        return tensor

    monkeypatch.setattr(torch.cuda, "stream", on)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: current[-1])
    monkeypatch.setattr(inputs, "sent", sent)
    monkeypatch.setattr(inputs, "keep", lambda _: told.append(f"memory is kept for {current[-1].name}"))
    return told


def test_pixels_and_features_are_copied_on_a_stream_of_their_own_and_waited_for(told: list[str]) -> None:
    step: Any = SimpleNamespace(
        stream=FakeStream("copying", told), accelerator=SimpleNamespace(device=torch.device("cpu"))
    )
    StepInputs.bring(step, torch.zeros(1))
    assert told == ["copy on copying", "computing waits for copying", "memory is kept for computing"]


def test_all_steps_have_one_stream_for_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    copy_stream.cache_clear()
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: object())
    try:
        assert copy_stream(torch.device("cuda:0")) is copy_stream(torch.device("cuda:0"))
        assert copy_stream(torch.device("cuda:0")) is not copy_stream(torch.device("cuda:1"))
    finally:
        copy_stream.cache_clear()
