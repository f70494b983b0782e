"""Gradient checkpointing, part by part: the same numbers to the last bit, layers computed twice, less memory kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.modeling_layers import GradientCheckpointingLayer

from conftest import make_model, write_llava
from mllm.config import parse, validate
from mllm.models.connectors import QFormerConnector
from mllm.models.multimodal import MultimodalLM
from mllm.train.losses import NextToken
from mllm.train.settings import TrainConfig
from mllm.train.trainable import LearningRates, choose_trainable, set_mode
from mllm.train.tuning.adapters import Lora
from mllm.train.tuning.checkpointing import advice, checkpointed, switch_on
from runs import metrics, run, settings, weights

ALL = ["llm", "connector", "vision_encoder"]
RATES = LearningRates(connector=1e-2, llm=1e-2, vision_encoder=1e-3)
QFORMER = QFormerConnector(num_queries=4, hidden_size=16, num_layers=2, num_heads=2)


def chosen(rates: LearningRates = RATES, lora: Lora | None = None) -> MultimodalLM:
    model = make_model(connector=QFORMER)
    torch.manual_seed(5)
    choose_trainable(model, rates, lora)
    return model


@pytest.mark.parametrize("lora", [None, Lora(rank=4, alpha=8, dropout=0.3)], ids=["whole", "lora with dropout"])
@pytest.mark.parametrize("which", [["llm"], ["connector"], ["vision_encoder"], ALL], ids="+".join)
def test_losses_and_weights_are_equal_to_the_last_bit(tmp_path: Path, which: list[Any], lora: Lora | None) -> None:
    data, found = write_llava(tmp_path), []
    for choice in (False, which):
        train = settings(tmp_path / str(choice), steps=2, learning_rate=RATES, gradient_checkpointing=choice)
        after = weights(run(data, train, chosen(lora=lora)))
        found.append((metrics(train.output_dir), after))
    assert found[0][0] == found[1][0]
    assert all(torch.equal(tensor, found[1][1][name]) for name, tensor in found[0][1].items())


def batch(model: MultimodalLM) -> tuple[Any, ...]:
    ids = torch.full((1, 40), 9)
    ids[:, :4] = model.image_token_id
    return ids, torch.full_like(ids, 9), torch.arange(40)[None], torch.zeros(1, 3, 28, 28), 1


@pytest.mark.parametrize("which", ALL)
def test_layers_of_the_named_part_and_no_others_run_twice(which: Any) -> None:
    model, calls = chosen(), dict.fromkeys(ALL, 0)

    def count(part: str) -> Any:
        return lambda *_: calls.update({part: calls[part] + 1})

    first = {
        part: next(m for m in getattr(model, part).modules() if isinstance(m, torch.nn.LayerNorm)) for part in ALL[1:]
    }
    layers = [m for m in model.llm.modules() if isinstance(m, GradientCheckpointingLayer)]
    for part, module in {**first, "llm": layers[0].self_attn}.items():
        module.register_forward_pre_hook(count(part))
    encoder = [m for m in model.vision_encoder.modules() if isinstance(m, GradientCheckpointingLayer)]
    encoder[0].self_attn.register_forward_pre_hook(count("vision_encoder"))
    calls["vision_encoder"] = -1  # the embedding's norm lies outside the layers
    switch_on(model, [which])
    set_mode(model)
    NextToken(model)(*batch(model)).backward()
    assert calls == {part: 2 if part == which else 1 for part in ALL}


@pytest.mark.parametrize("which", ALL)
def test_less_is_kept_for_the_backward_pass(which: Any) -> None:
    kept = {}
    for choice in (False, [which]):
        model, sizes = chosen(), []
        switch_on(model, choice)
        set_mode(model)
        own = {p.data_ptr() for p in model.parameters()}
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, sizes=sizes, own=own: (sizes.append(t.numel() * (t.data_ptr() not in own)), t)[1], lambda t: t
        ):
            NextToken(model)(*batch(model))
        kept[bool(choice)] = sum(sizes)
    assert kept[True] < kept[False]


@pytest.mark.parametrize(
    ("rates", "useless"),
    [
        (RATES, []),
        (LearningRates(connector=1e-2), ["vision_encoder"]),
        (LearningRates(llm=1e-2), ["connector", "vision_encoder"]),
        (LearningRates(vision_encoder=1e-2), []),
    ],
)
def test_where_it_cannot_save_memory_is_said(rates: LearningRates, useless: list[str]) -> None:
    said = advice(chosen(rates), list(ALL))
    assert [words.split()[3] for words in said] == useless


def test_plain_true_means_the_llm_in_a_yaml_and_as_a_flag(tmp_path: Path) -> None:
    plain = {"output_dir": "x", "learning_rate": {"connector": 1e-3}}
    (tmp_path / "run.yaml").write_text("train: {output_dir: x, learning_rate: {connector: 1e-3}}")
    start = ["--config", str(tmp_path / "run.yaml")]

    def of_yaml(**more: Any) -> TrainConfig:
        return validate({"train": plain | more}, "test").train

    asked: list[tuple[TrainConfig, tuple[str, ...]]] = [
        (of_yaml(), ()),
        (of_yaml(gradient_checkpointing=True), ("llm",)),
        (of_yaml(gradient_checkpointing=["vision_encoder", "llm"]), ("llm", "vision_encoder")),
        (parse([*start, "--train.gradient_checkpointing", "true"]).train, ("llm",)),
        (parse([*start, "--train.gradient_checkpointing"]).train, ("llm",)),
        (parse([*start, "--train.gradient_checkpointing", "[connector]"]).train, ("connector",)),
    ]
    for train, parts in asked:
        assert checkpointed(train.gradient_checkpointing) == parts
    for wrong in ([], ["head"], "head"):
        with pytest.raises(ValueError, match="gradient_checkpointing"):
            of_yaml(gradient_checkpointing=wrong)
