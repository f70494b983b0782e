"""One table says what trains: nothing else moves, nothing else has a state, and the table's mistakes are told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers.modeling_layers import GradientCheckpointingLayer

from conftest import make_model, write_llava
from mllm.train.losses import NextToken
from mllm.train.trainable import (
    LearningRates,
    Lora,
    choose_trainable,
    parameter_groups,
    parts,
    set_mode,
    trained_weights,
)
from runs import LORA, chosen_model, metrics, run, settings, weights

ALL = ("connector", "llm", "vision_encoder")
RATES = LearningRates(connector=1e-3, llm=2e-5, vision_encoder=1e-6)


@pytest.mark.parametrize(
    "named",
    [("connector",), ("llm",), ("vision_encoder",), ("connector", "llm"), ALL],
)
def test_frozen_parts_do_not_move_and_named_ones_do(tmp_path: Path, named: tuple[str, ...]) -> None:
    data = write_llava(tmp_path)
    train = settings(tmp_path / "out", steps=2, learning_rate=LearningRates(**dict.fromkeys(named, 1e-2)))
    before = weights(chosen_model(train))
    after = weights(run(data, train))
    moved = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert moved == set(named)


def test_lora_moves_its_adapter_and_no_weight_below_it(tmp_path: Path) -> None:
    data, train = write_llava(tmp_path), settings(tmp_path / "out", steps=2, **LORA)
    before = weights(chosen_model(train))
    after = weights(run(data, train))
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert {name for name in moved if name.startswith("llm.")} == {name for name in before if "lora_" in name}
    assert {name.split(".")[0] for name in moved} == {"connector", "llm"}


def test_lora_sits_in_every_linear_layer_of_the_llm_but_its_head_and_nowhere_else() -> None:
    model = chosen_model(settings(Path("x"), **LORA))
    adapted = {name.split(".lora_")[0] for name, _ in model.named_parameters() if "lora_" in name}
    linear = {n for n, m in make_model().llm.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"}
    assert adapted == {f"llm.base_model.model.{name}" for name in linear}


def test_lora_starts_where_the_llm_was() -> None:
    plain, adapted = make_model().eval(), chosen_model(settings(Path("x"), **LORA)).eval()
    ids = torch.randint(6, 300, (1, 9))
    with torch.no_grad():
        assert torch.equal(plain.llm(ids).logits, adapted.llm(ids).logits)


@pytest.mark.parametrize("lora", [None, Lora(rank=4, alpha=8)])
def test_optimiser_holds_exactly_what_trains_once_at_its_parts_rate(lora: Lora | None) -> None:
    model = make_model(tie_word_embeddings=True)
    choose_trainable(model, RATES, lora)
    groups = parameter_groups(model, RATES, weight_decay=0.1)
    held = [id(p) for group in groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in trained_weights(model).values())
    names = {id(p): name for name, p in model.named_parameters()}
    for group in groups:
        assert group["lr"] == group["peak"] == getattr(RATES, group["part"])
        assert {names[id(p)].split(".")[0] for p in group["params"]} == {group["part"]}


def test_biases_and_norms_do_not_decay() -> None:
    model = make_model()
    choose_trainable(model, RATES, None)
    for group in parameter_groups(model, RATES, weight_decay=0.1):
        assert {p.ndim >= 2 for p in group["params"]} == {group["weight_decay"] > 0}


def test_frozen_parts_have_no_optimiser_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[torch.optim.Optimizer] = []
    own = torch.optim.AdamW.__init__
    monkeypatch.setattr(torch.optim.AdamW, "__init__", lambda o, *a, **k: (made.append(o), own(o, *a, **k))[1])
    model = run(write_llava(tmp_path), settings(tmp_path / "out", steps=2))
    assert {id(p) for p in made[0].state} == {id(p) for p in model.connector.parameters()}


def test_what_is_frozen_keeps_half_precision_and_what_trains_is_float32() -> None:
    model = make_model().bfloat16()
    choose_trainable(model, **{"rates": LORA["learning_rate"], "lora": LORA["lora"]})
    trained = {p.dtype for p in model.parameters() if p.requires_grad}
    frozen = {p.dtype for p in model.parameters() if not p.requires_grad}
    assert trained == {torch.float32}
    assert frozen == {torch.bfloat16}


def test_half_precision_run_with_lora_trains(tmp_path: Path) -> None:
    train = settings(tmp_path / "out", steps=2, **LORA)
    model = make_model()
    model.vision_encoder.bfloat16()
    model.llm.bfloat16()
    choose_trainable(model, train.learning_rate, train.lora)
    before = weights(model)
    after = weights(run(write_llava(tmp_path), train, model))
    assert all(torch.isfinite(p).all() for p in after.values())
    assert any(not torch.equal(before[name], after[name]) for name in before if "lora_" in name)


@pytest.mark.parametrize(
    ("rates", "lora", "said"),
    [
        (LearningRates(), None, "nothing trains"),
        (LearningRates(connector=1e-3), Lora(), r"learning_rate\.llm"),
        (LearningRates(), Lora(), r"learning_rate\.llm"),
    ],
)
def test_table_that_cannot_be_meant_is_refused(rates: LearningRates, lora: Lora | None, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        choose_trainable(make_model(), rates, lora)


def test_frozen_parts_behave_as_in_use_and_trained_ones_train() -> None:
    model = chosen_model(settings(Path("x")))
    set_mode(model)
    assert (model.vision_encoder.training, model.connector.training, model.llm.training) == (False, True, False)


def test_table_counts_every_parameter_once() -> None:
    model = chosen_model(settings(Path("x"), **LORA))
    rows = parts(model, LORA["learning_rate"])
    assert sum(row.trained + row.frozen for row in rows) == sum(p.numel() for p in model.parameters())
    assert {row.name: bool(row.trained) for row in rows} == {"vision_encoder": False, "connector": True, "llm": True}


@pytest.mark.parametrize("more", [{}, LORA], ids=["frozen llm", "lora"])
def test_gradient_checkpointing_recomputes_the_layers_of_a_frozen_llm_too(tmp_path: Path, more: Any) -> None:
    """transformers recomputes in training mode only, and a frozen LLM is not in it."""
    train = settings(tmp_path / "out", steps=1, rows_per_step=1, rows_per_micro_batch=1, **more)
    calls = {}
    for on in (False, True):
        model, count = chosen_model(train), []
        layers = [m for m in model.llm.modules() if isinstance(m, GradientCheckpointingLayer)]
        layers[0].self_attn.register_forward_pre_hook(lambda *_, count=count: count.append(1))
        train.gradient_checkpointing = on
        run(write_llava(tmp_path), train, model)
        calls[on] = len(count)
    assert calls == {False: 1, True: 2}


def test_gradient_checkpointing_does_not_switch_on_dropout_in_a_frozen_llm() -> None:
    model = chosen_model(settings(Path("x")), attention_dropout=0.5)
    model.llm.gradient_checkpointing_enable({"use_reentrant": False})
    set_mode(model)
    attention = [m for m in model.llm.modules() if hasattr(m, "attention_dropout")]
    assert attention
    assert not any(m.training for m in attention)


def test_gradient_checkpointing_changes_no_loss(tmp_path: Path) -> None:
    data = write_llava(tmp_path)
    for name, on in (("off", False), ("on", True)):
        run(data, settings(tmp_path / name, steps=2, gradient_checkpointing=on, **LORA))
    off, on = ([line[1] for line in metrics(tmp_path / name)] for name in ("off", "on"))
    assert off == pytest.approx(on, rel=1e-6)


def test_weights_that_never_get_a_gradient_do_not_count_as_trained() -> None:
    """The encoder's final norm and pooler lie behind the tap: under DDP they would stop the run."""
    model = chosen_model(settings(Path("x"), learning_rate=LearningRates(connector=1e-3, vision_encoder=1e-3)))
    pixels, ids = torch.zeros(1, 3, 28, 28), torch.full((1, 6), model.image_token_id)
    ids[:, 4:] = 9
    labels = torch.full_like(ids, 9)
    NextToken(model)(ids, labels, torch.arange(6)[None], pixels, 1).backward()
    assert [name for name, p in trained_weights(model).items() if p.grad is None] == []


def test_full_training_after_lora_merges_the_adapter_first() -> None:
    """Otherwise the stage would save the adapter alone and lose what the layers below it learned."""
    model = chosen_model(settings(Path("x"), **LORA)).eval()
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.1)
    ids = torch.randint(6, 300, (1, 9))
    with torch.no_grad():
        before = model.llm(ids).logits
        choose_trainable(model, LearningRates(llm=1e-3), None)
        torch.testing.assert_close(model.eval().llm(ids).logits, before, rtol=0, atol=1e-5)
    assert not isinstance(model.llm, PeftModel)
    assert all(p.requires_grad for p in model.llm.parameters())


def test_adapter_of_an_earlier_stage_goes_on_training() -> None:
    model = chosen_model(settings(Path("x"), **LORA))
    adapter = {n: p for n, p in model.llm.named_parameters() if "lora_" in n}
    choose_trainable(model, LORA["learning_rate"], LORA["lora"])
    assert {n: p for n, p in model.llm.named_parameters() if p.requires_grad} == adapter


def test_adapter_of_an_earlier_stage_of_another_size_is_refused_with_both_sizes() -> None:
    model = chosen_model(settings(Path("x"), **LORA))
    with pytest.raises(ValueError, match=r"rank 4.*rank 8|rank 8.*rank 4"):
        choose_trainable(model, LORA["learning_rate"], Lora(rank=8, alpha=8))
