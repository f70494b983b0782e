"""One table says what trains: nothing else moves, nothing else has a state, and the table's mistakes are told."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from rich.console import Console
from transformers.modeling_layers import GradientCheckpointingLayer

from conftest import make_model, write_llava
from mllm.config import validate
from mllm.models.multimodal import MultimodalLM
from mllm.train.losses import NextToken
from mllm.train.preflight import parts_table
from mllm.train.trainable import (
    LearningRates,
    Lora,
    choose_trainable,
    parameter_groups,
    parts,
    set_mode,
    trained_weights,
)
from mllm.train.tuning.checkpointing import switch_on
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
        (LearningRates(connector=0.0), None, "nothing trains"),
        (LearningRates(connector=1e-3, patterns={"connector": 0.0}), None, "nothing trains"),
        (
            LearningRates(connector=1e-3, layer_decay={"llm": 0.9}),
            None,
            r"layer_decay\.llm without .*learning_rate\.llm",
        ),
        (LearningRates(connector=1e-3, layer_decay={"connector": 0.9}), None, "no list of layers"),
        (LearningRates(llm=1e-3, patterns={"embed_token$": 2.0}), None, r"near ones: llm\.model\.embed_tokens\.weight"),
        (LearningRates(llm=1e-3, patterns={"^connector": 2.0}), None, r"only in frozen ones \(connector\."),
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
    switch_on(model, True)
    set_mode(model)
    attention = [m for m in model.llm.modules() if hasattr(m, "attention_dropout")]
    assert attention
    assert not any(m.training for m in attention)


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


# ---------------------------------------------------------------- patterns and layer decay


def rate_of(model: MultimodalLM, rates: LearningRates) -> dict[str, float]:
    """The peak rate of everything that trains, by name."""
    names = {id(p): name for name, p in model.named_parameters()}
    groups = parameter_groups(model, rates, weight_decay=0.1)
    return {names[id(p)]: group["peak"] for group in groups for p in group["params"]}


def test_without_patterns_the_groups_are_a_part_s_matrices_then_its_vectors() -> None:
    """Checkpoints number the optimiser's moments in this order."""
    model = make_model()
    choose_trainable(model, RATES, None)
    order = [p for group in parameter_groups(model, RATES, 0.1) for p in group["params"]]
    expected = []
    for part in ALL:
        own = [p for p in getattr(model, part).parameters() if p.requires_grad]
        expected += [p for p in own if p.ndim >= 2] + [p for p in own if p.ndim < 2]
    assert [id(p) for p in order] == [id(p) for p in expected]


def test_patterns_scale_what_they_are_found_in_and_nothing_else() -> None:
    rates = LearningRates(connector=1e-3, llm=2e-5, patterns={"llm.*embed_tokens": 0.1, r"connector.*\.bias": 2.0})
    model = make_model()
    choose_trainable(model, rates, None)
    for name, rate in rate_of(model, rates).items():
        part = 1e-3 if name.startswith("connector") else 2e-5
        scale = 0.1 if "embed_tokens" in name else 2.0 if name.endswith(".bias") and part == 1e-3 else 1.0
        assert rate == part * scale, name


def test_several_patterns_multiply_whatever_their_order() -> None:
    both = {"embed_tokens": 0.5, "llm": 0.1}
    found = []
    for patterns in (both, dict(reversed(both.items()))):
        rates, model = LearningRates(llm=1.0, patterns=patterns), make_model()
        choose_trainable(model, rates, None)
        found.append(rate_of(model, rates))
    assert found[0] == found[1]
    assert found[0]["llm.model.embed_tokens.weight"] == pytest.approx(0.05)


def test_pattern_names_what_lies_behind_an_adapters_wrapping() -> None:
    """LoRA+ (arXiv 2402.12354) is one line: B sixteen times as fast as A."""
    rates = LearningRates(llm=1e-4, patterns={r"^llm\.model\.layers\.\d+\..*lora_B": 16.0})
    model = make_model()
    choose_trainable(model, rates, Lora(rank=4, alpha=8))
    assert {(("lora_B" in name), rate) for name, rate in rate_of(model, rates).items()} == {
        (True, 16e-4),
        (False, 1e-4),
    }


def test_scale_of_zero_freezes(tmp_path: Path) -> None:
    rates = LearningRates(llm=1e-2, patterns={"embed_tokens|lm_head": 0.0})
    train = settings(tmp_path / "out", steps=2, learning_rate=rates)
    before = weights(chosen_model(train))
    after = weights(run(write_llava(tmp_path), train))
    still = {name for name in before if torch.equal(before[name], after[name]) and name.startswith("llm.")}
    assert still == {"llm.model.embed_tokens.weight", "llm.lm_head.weight"}


@pytest.mark.parametrize("lora", [None, Lora(rank=4, alpha=8)], ids=["whole", "lora"])
def test_layer_decay_slows_each_layer_below_the_last_and_embeddings_most(lora: Lora | None) -> None:
    rates = LearningRates(llm=1.0, vision_encoder=1.0, layer_decay={"llm": 0.5, "vision_encoder": 0.1})
    model = make_model()
    choose_trainable(model, rates, lora)
    depth = {"llm": 2, "vision_encoder": 2}  # the encoder's third layer lies behind the tap
    for name, rate in rate_of(model, rates).items():
        part = name.split(".")[0]
        decay, layer = rates.layer_decay[part], re.search(r"layers\.(\d+)\.", name)
        in_front = any(word in name for word in ("embed", "pre_layrnorm"))
        below = depth[part] - 1 - int(layer[1]) if layer else depth[part] if in_front else 0
        assert rate == pytest.approx(decay**below), name


def test_refined_groups_train_to_the_same_weights_as_scaled_gradients_would(tmp_path: Path) -> None:
    """A pattern's factor is on the rate itself: half the rate by a pattern is half the rate by the table."""
    data = write_llava(tmp_path)
    plain, scaled = LearningRates(connector=5e-3), LearningRates(connector=1e-2, patterns={"connector": 0.5})
    left, right = (
        weights(run(data, settings(tmp_path / name, learning_rate=rates, weight_decay=0.1)))
        for name, rates in (("plain", plain), ("scaled", scaled))
    )
    assert all(torch.equal(left[name], right[name]) for name in left)


def test_metrics_tell_the_part_s_own_rate_where_groups_have_factors(tmp_path: Path) -> None:
    rates = LearningRates(connector=1e-2, patterns={r"connector.*\.bias": 0.1})
    run(write_llava(tmp_path), settings(tmp_path / "out", learning_rate=rates, schedule="constant", warmup=0.0))
    assert [line[0] for line in metrics(tmp_path / "out", "learning_rate")] == [{"connector": pytest.approx(1e-2)}] * 4


def test_printed_table_shows_what_refines_a_rate() -> None:
    rates = LearningRates(connector=1e-3, llm=1e-4, patterns={"llm.*embed_tokens": 0.1}, layer_decay={"llm": 0.5})
    model = make_model()
    choose_trainable(model, rates, None)
    console = Console(width=120, file=io.StringIO())
    console.print(parts_table(model, rates))
    said = console.file.getvalue()
    assert re.search(r"× 0.1  llm\.\*embed_tokens\s+│\s+│ 12,288\s+│ 2.5e-06", said)
    assert re.search(r"× 0.5 a layer down\s+│\s+│ [\d,]+\s+│ 2.5e-06 – 0.0001", said)


def test_table_s_mistakes_are_told_with_the_config(tmp_path: Path) -> None:
    for wrong, said in (
        ({"vision": 1e-6}, "did you mean 'vision_encoder'"),
        ({"llm": 1e-5, "patterns": {"(": 1.0}}, "no regular expression"),
        ({"llm": 1e-5, "patterns": {"llm": -1.0}}, "greater than or equal to 0"),
        ({"llm": 1e-5, "layer_decay": {"llm": 1.1}}, "less than or equal to 1"),
        ({"llm": 1e-5, "layer_decay": {"vision": 0.9}}, "vision_encoder"),
    ):
        with pytest.raises(ValueError, match=said):
            validate({"train": {"output_dir": "x", "learning_rate": wrong}}, "test")


def test_resume_with_other_patterns_is_refused_where_moments_would_be_mixed_up(tmp_path: Path) -> None:
    """The optimiser's state is numbered by groups: other groups, other weights under the same number."""
    data = write_llava(tmp_path)

    def go_on(steps: int, **table: Any) -> None:
        rates = LearningRates(llm=1e-3, **table)
        train = settings(tmp_path / "out", steps=steps, save_every=1, learning_rate=rates)
        run(data, train, resume=steps > 1)

    go_on(1, patterns={r"layers\.0": 0.5})
    go_on(2, patterns={r"layers\.0": 0.1})  # another factor on the same weights
    for other in ({}, {"patterns": {r"layers\.1": 0.5}}, {"layer_decay": {"llm": 0.9}}):
        with pytest.raises(ValueError, match=r"other patterns or another layer_decay.*--overwrite"):
            go_on(3, **other)
    go_on(3, patterns={r"layers\.0": 0.5})
