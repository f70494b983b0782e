"""LoRA, DoRA and rsLoRA, on the LLM and on the encoder: where they sit, what they change, and that a load keeps it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from conftest import make_model, make_processor, write_llava
from mllm.models.multimodal import MultimodalLM
from mllm.train.losses import NextToken
from mllm.train.settings import TrainConfig
from mllm.train.stage_folder import load_stage, save_stage
from mllm.train.trainable import LearningRates, choose_trainable, trained_weights
from mllm.train.tuning.adapters import Lora, merge_lora
from runs import on_two_ranks, run, settings, start_engine, weights

ALL_RATES = LearningRates(connector=1e-2, llm=1e-2, vision_encoder=1e-2)
KINDS = {
    "lora": Lora(rank=4, alpha=8),
    "dora": Lora(rank=4, alpha=8, dora=True),
    "rslora": Lora(rank=4, alpha=8, rslora=True),
    "targets": Lora(rank=4, alpha=8, targets=["q_proj", "v_proj"]),
}


def chosen(train: TrainConfig, **llm: Any) -> MultimodalLM:
    model = make_model(**llm)
    torch.manual_seed(5)
    choose_trainable(model, train.learning_rate, train.lora, train.vision_lora)
    return model


def both(folder: Path, lora: Lora, **changes: Any) -> TrainConfig:
    """Adapters of one kind on both big parts."""
    return settings(folder, **{"steps": 2, "learning_rate": ALL_RATES, "lora": lora, "vision_lora": lora} | changes)


def states(model: MultimodalLM) -> torch.Tensor:
    """Hidden states of two pictures and a few words."""
    pixels = torch.randn(2, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    ids = torch.full((1, 12), model.image_token_id)
    ids[0, 8:] = torch.arange(20, 24)
    with torch.no_grad():
        return model.logits(model.eval()(ids, torch.arange(12)[None], pixels, 2))


@pytest.mark.parametrize("kind", KINDS)
def test_adapter_moves_and_no_weight_below_it(tmp_path: Path, kind: str) -> None:
    train = both(tmp_path / "out", KINDS[kind])
    before = weights(chosen(train))
    after = weights(run(write_llava(tmp_path), train, chosen(train)))
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert {name for name in moved if not name.startswith("connector")} == {name for name in before if ".lora_" in name}
    assert {name.split(".")[0] for name in moved} == {"connector", "llm", "vision_encoder"}


@pytest.mark.parametrize("kind", KINDS)
def test_saved_adapters_give_the_same_logits_and_so_do_merged_ones(tmp_path: Path, kind: str) -> None:
    train = both(tmp_path / "out", KINDS[kind])
    trained = run(write_llava(tmp_path), train, chosen(train))
    save_stage(train.output_dir, trained, make_processor(), "model: {}\n")
    loaded = make_model(seed=0)
    load_stage(loaded, train.output_dir)
    expected = states(trained)
    assert torch.equal(states(loaded), expected)
    assert (states(make_model()) - expected).abs().max() > 1e-2
    merge_lora(loaded)
    assert not any("lora" in name for name, _ in loaded.named_parameters())
    torch.testing.assert_close(states(loaded), expected, rtol=1e-5, atol=1e-5)


def test_merged_stage_is_saved_whole(tmp_path: Path) -> None:
    """What differs from the Hub's weights must be on disk, also where nothing of it trains any more."""
    train = both(tmp_path / "out", KINDS["lora"])
    trained = run(write_llava(tmp_path), train, chosen(train))
    merge_lora(trained)
    (tmp_path / "merged").mkdir()
    save_stage(tmp_path / "merged", trained, make_processor(), "model: {}\n")
    loaded = make_model()
    load_stage(loaded, tmp_path / "merged")
    assert torch.equal(states(loaded), states(trained))


def test_encoder_adapter_sits_in_the_layers_in_front_of_the_tap_and_starts_where_the_encoder_was() -> None:
    model = chosen(both(Path("x"), KINDS["lora"]))
    places = {name.split(".lora_")[0] for name, _ in model.vision_encoder.named_parameters() if ".lora_" in name}
    plain = make_model().vision_encoder
    linear = {n.removeprefix("model.") for n, m in plain.named_modules() if isinstance(m, torch.nn.Linear)}
    assert places == {f"model.base_model.model.{name}" for name in linear if "encoder.layers" in name}
    pixels = torch.randn(1, 3, 28, 28)
    with torch.no_grad():
        assert torch.equal(model.vision_encoder.eval()(pixels), plain.eval()(pixels))


def test_each_part_has_its_own_adapter(tmp_path: Path) -> None:
    rates = LearningRates(vision_encoder=1e-2)
    train = settings(tmp_path / "out", steps=2, learning_rate=rates, vision_lora=KINDS["lora"])
    trained = run(write_llava(tmp_path), train, chosen(train))
    assert {name.split(".")[0] for name in trained_weights(trained)} == {"vision_encoder"}
    save_stage(train.output_dir, trained, make_processor(), "model: {}\n")
    assert (train.output_dir / "vision_adapter" / "adapter_model.safetensors").is_file()
    assert not (train.output_dir / "adapter").exists()
    assert not (train.output_dir / "vision_encoder.safetensors").exists()


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_everything_that_trains_gets_a_gradient(kind: str) -> None:
    """A trained weight behind the tap would stop a run on several ranks."""
    model = chosen(both(Path("x"), KINDS[kind]))
    pixels, ids = torch.zeros(1, 3, 28, 28), torch.full((1, 6), model.image_token_id)
    ids[:, 4:] = 9
    NextToken(model)(ids, torch.full_like(ids, 9), torch.arange(6)[None], pixels, 1).backward()
    assert [name for name, p in trained_weights(model).items() if p.grad is None] == []


def test_earlier_adapters_go_on_training_or_stay_frozen_or_are_merged() -> None:
    model = chosen(both(Path("x"), KINDS["lora"]))
    own = {name for name, _ in model.named_parameters() if ".lora_" in name}
    choose_trainable(model, ALL_RATES, KINDS["lora"], KINDS["lora"])
    assert {name for name in trained_weights(model) if not name.startswith("connector")} == own
    choose_trainable(model, LearningRates(connector=1e-3), None)
    assert not any(".lora_" in name for name in trained_weights(model))
    assert {name for name, _ in model.named_parameters() if ".lora_" in name} == own
    choose_trainable(model, ALL_RATES, None)
    assert not any(".lora_" in name for name, _ in model.named_parameters())
    assert model.llm.differs_from_hub
    assert model.vision_encoder.differs_from_hub


def test_dropout_is_the_new_stages_own() -> None:
    model = chosen(both(Path("x"), KINDS["lora"]))
    choose_trainable(model, ALL_RATES, Lora(rank=4, alpha=8, dropout=0.3), KINDS["lora"])
    drops = [m for name, m in model.llm.named_modules() if name.endswith("lora_dropout.default")]
    assert drops
    assert {m.p for m in drops} == {0.3}
    assert not [m for m in model.vision_encoder.modules() if isinstance(m, torch.nn.Dropout)]


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (Lora(rank=8, alpha=8), "has rank 4 and alpha 8, train.lora says rank 8 and alpha 8"),
        (Lora(rank=4, alpha=4), "alpha 4"),
        (Lora(rank=4, alpha=8, dora=True), "says rank 4 and alpha 8 and DoRA"),
        (Lora(rank=4, alpha=8, rslora=True), "says rank 4 and alpha 8 and rsLoRA"),
        (Lora(rank=4, alpha=8, targets=["q_proj"]), "sits in 14 layers, train.lora.targets names 2"),
    ],
)
def test_adapter_of_another_kind_or_size_is_refused_with_both(other: Lora, said: str) -> None:
    model = chosen(both(Path("x"), KINDS["lora"]))
    with pytest.raises(ValueError, match=said):
        choose_trainable(model, ALL_RATES, other)


@pytest.mark.parametrize(
    ("targets", "said"),
    [
        (["query"], "its layers end in down_proj, gate_proj, k_proj"),
        ("q_proj", "regular expression of a whole name like"),
        (["q_proj", "lm_head"], "lm_head, the head"),
    ],
)
def test_targets_that_name_nothing_or_the_head_are_refused(targets: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        choose_trainable(make_model(), ALL_RATES, Lora(targets=targets))


def test_regular_expression_reaches_the_llm_and_never_the_encoder() -> None:
    """Encoder and LLM both have a `layers.1.self_attn.q_proj`."""
    model = make_model()
    choose_trainable(model, LearningRates(llm=1e-3), Lora(targets=r".*layers\.1\.self_attn\.[qv]_proj"))
    places = {name.split(".lora_")[0] for name in trained_weights(model)}
    expected = {f"llm.base_model.model.model.layers.1.self_attn.{name}_proj" for name in "qv"}
    assert places == expected


def test_vision_lora_without_a_rate_is_refused() -> None:
    with pytest.raises(ValueError, match=r"train\.vision_lora without train\.learning_rate\.vision_encoder"):
        choose_trainable(make_model(), LearningRates(connector=1e-3), None, Lora())


def test_files_are_pefts_own(tmp_path: Path) -> None:
    train = both(tmp_path / "out", Lora(rank=4, alpha=8, dora=True, rslora=True))
    save_stage(tmp_path, chosen(train), make_processor(), "model: {}\n")
    for folder in ("adapter", "vision_adapter"):
        saved = json.loads((tmp_path / folder / "adapter_config.json").read_text())
        assert (saved["r"], saved["lora_alpha"], saved["use_dora"], saved["use_rslora"]) == (4, 8, True, True)
        assert all("lora_" in name for name in load_file(tmp_path / folder / "adapter_model.safetensors"))
    again = PeftModel.from_pretrained(make_model().llm, tmp_path / "adapter")
    assert again.peft_config["default"].use_dora


TWO = {"ddp": "lora", "zero2": "dora", "zero3": "lora", "zero3 dora": "dora"}
"""What two ranks train, and under which engine."""


def on_rank(rank: int, data: Path, folder: Path) -> None:
    for name, kind in TWO.items():
        accelerator = start_engine(name.split()[0])
        train = both(folder / name, KINDS[kind], rows_per_micro_batch=1, max_grad_norm=0.5)
        model = run(data, train, chosen(train), accelerator=accelerator)
        assert torch.distributed.get_world_size() == 2
        save_stage(train.output_dir, model, make_processor(), "model: {}\n", rank == 0)
        accelerator.wait_for_everyone()
    torch.distributed.destroy_process_group()


@pytest.mark.recipe
def test_two_ranks_with_an_adapter_on_the_encoder_leave_the_stage_of_one_process(tmp_path: Path) -> None:
    pytest.importorskip("deepspeed", reason="deepspeed is not installed: pip install 'mllm[deepspeed]'")
    data = write_llava(tmp_path)
    on_two_ranks(on_rank, data, tmp_path)
    for name, kind in TWO.items():
        train = both(tmp_path / kind, KINDS[kind], max_grad_norm=0.5)
        one, two = states(run(data, train, chosen(train))), make_model()
        load_stage(two, tmp_path / name)
        torch.testing.assert_close(states(two), one, rtol=1e-4, atol=1e-4, msg=name)
