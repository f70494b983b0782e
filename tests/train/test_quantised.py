"""An LLM in four bits (QLoRA): what is quantised, that it trains, that disk, merging and ranks keep its logits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from conftest import make_clip, make_llm, make_processor, make_tokenizer, write_llava
from mllm.config import RunConfig, dump_config
from mllm.generate import Assistant
from mllm.models.build import ModelConfig, build_model
from mllm.models.multimodal import MultimodalLM
from mllm.models.quantised import dequantise, is_4bit, is_quantised, numel, quantise
from mllm.train.settings import TrainConfig
from mllm.train.stage_folder import load_stage, save_stage
from mllm.train.trainable import LearningRates, choose_trainable, parts, trained_weights
from mllm.train.tuning.adapters import Lora, merge_lora
from mllm.types import Mark, Message, Sample
from runs import LORA, on_two_ranks, run, settings, start_engine, weights

pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: pip install 'mllm[quantize]'")

WHOLE = LearningRates(llm=1e-3)


@pytest.fixture(scope="module")
def wide_hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As `hub`, with an LLM as wide as four bits ask for: blocks of 64 weights."""
    folder = tmp_path_factory.mktemp("wide")
    make_clip().save_pretrained(folder / "encoder")
    make_processor().image_processor.save_pretrained(folder / "encoder")
    make_llm(hidden_size=64, intermediate_size=128).save_pretrained(folder / "llm")
    make_tokenizer().save_pretrained(folder / "llm")
    return folder


def config(hub: Path, **more: Any) -> ModelConfig:
    return ModelConfig(str(hub / "encoder"), str(hub / "llm"), **{"quantisation": "nf4", **more})


def build(hub: Path, **more: Any) -> MultimodalLM:
    torch.manual_seed(1)
    return build_model(config(hub, **more), make_processor().image_token_id)


def chosen(hub: Path, train: TrainConfig, **more: Any) -> MultimodalLM:
    model = build(hub, **more)
    torch.manual_seed(5)
    choose_trainable(model, train.learning_rate, train.lora)
    return model


def logits(model: MultimodalLM) -> torch.Tensor:
    pixels = torch.randn(1, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    ids = torch.full((1, 8), model.image_token_id)
    ids[0, 4:] = torch.arange(20, 24)
    with torch.no_grad():
        return model.logits(model.eval()(ids, torch.arange(8)[None], pixels, 1))


def save(folder: Path, model: MultimodalLM, parts: ModelConfig, train: TrainConfig) -> None:
    save_stage(folder, model, make_processor(), dump_config(RunConfig(train=train, model=parts)))


@pytest.fixture(scope="module")
def stage(wide_hub: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.Tensor]:
    """A finished QLoRA stage, and its logits as they were in memory."""
    folder = tmp_path_factory.mktemp("qlora")
    train = settings(folder / "out", **LORA)
    model = run(write_llava(folder), train, chosen(wide_hub, train))
    save(train.output_dir, model, config(wide_hub), train)
    return train.output_dir, logits(model)


def test_four_bits_hold_every_linear_layer_of_the_llm_but_its_head_and_nothing_else(wide_hub: Path) -> None:
    model = build(wide_hub)
    packed = {name.removesuffix(".weight") for name, p in model.named_parameters() if is_4bit(p)}
    plain = build(wide_hub, quantisation=None).llm
    linear = {n for n, m in plain.named_modules() if isinstance(m, torch.nn.Linear)}
    assert packed == {f"llm.{name}" for name in linear - {"lm_head"}}
    assert {p.dtype for name, p in model.named_parameters() if not is_4bit(p)} == {torch.float32}


def test_tied_head_stays_as_it_is(wide_hub: Path, tmp_path: Path) -> None:
    make_llm(hidden_size=64, intermediate_size=128, tie_word_embeddings=True).save_pretrained(tmp_path / "llm")
    tied = config(wide_hub)
    tied.llm = str(tmp_path / "llm")
    llm = build_model(tied, make_processor().image_token_id).llm
    assert llm.get_input_embeddings().weight is llm.get_output_embeddings().weight
    assert llm.get_output_embeddings().weight.dtype == torch.float32


def test_quantising_in_memory_is_quantising_on_the_way_from_disk_and_can_be_undone_exactly(wide_hub: Path) -> None:
    model = build(wide_hub)
    expected = logits(model)
    other = build(wide_hub, quantisation=None)
    assert (logits(other) - expected).abs().max() > 1e-3  # four bits are not thirty-two
    quantise(other.llm, torch.float32)
    assert torch.equal(logits(other), expected)
    dequantise(other.llm)
    assert not is_quantised(other.llm)
    torch.testing.assert_close(logits(other), expected, rtol=0, atol=1e-6)
    assert "quantization_config" not in other.llm.config.to_dict()


def test_dry_run_with_random_weights_is_quantised_too(wide_hub: Path) -> None:
    assert is_quantised(build(wide_hub, random_weights=True).llm)


def test_evaluation_does_not_end_the_training_behind_it(wide_hub: Path) -> None:
    """On CPUs with AVX512-BF16 bitsandbytes repacks weights in a pass without gradients, and has no gradient then."""
    model = build(wide_hub)
    before = weights(model)
    with torch.no_grad():
        model.eval().llm(torch.arange(10, 18)[None])
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    inputs = torch.randn(1, 4, 64, requires_grad=True)
    model.llm(inputs_embeds=inputs).logits.sum().backward()
    assert inputs.grad is not None
    assert inputs.grad.abs().sum() > 0


def test_table_counts_the_weights_and_not_their_bytes(wide_hub: Path) -> None:
    sizes = [parts(build(wide_hub, quantisation=kind), LearningRates(llm=1.0))[2].frozen for kind in ("nf4", None)]
    assert sizes[0] == sizes[1] == sum(numel(p) for p in build(wide_hub).llm.parameters())


def test_full_tuning_of_four_bits_is_refused_in_words(wide_hub: Path) -> None:
    with pytest.raises(ValueError, match=r"four bits.*train\.lora \(QLoRA\), or set model\.quantisation to null"):
        choose_trainable(build(wide_hub), WHOLE, None)


@pytest.mark.parametrize("more", [{}, LORA], ids=["connector alone", "qlora"])
def test_training_moves_what_it_should_and_no_packed_weight(wide_hub: Path, tmp_path: Path, more: Any) -> None:
    train = settings(tmp_path / "out", steps=2, **more)
    before = weights(chosen(wide_hub, train))
    model = run(write_llava(tmp_path), train, chosen(wide_hub, train))
    moved = {name for name, tensor in weights(model).items() if not torch.equal(tensor, before[name])}
    assert moved == set(trained_weights(model))
    assert moved
    assert not any(is_4bit(p) for p in trained_weights(model).values())


def test_stage_gives_the_same_logits_when_it_is_loaded_and_chats(stage: tuple[Path, torch.Tensor]) -> None:
    folder, expected = stage
    assistant = Assistant.load(folder)
    assert is_quantised(assistant.model.llm)
    assert torch.equal(logits(assistant.model), expected)
    question = Sample("q", [Message("user", [Mark.IMAGE, "what is it?"])], [folder.parent / "images" / "0.png"])
    assert isinstance(assistant.answer([question], 4)[0], str)


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_merging_dequantises_first_so_that_merged_equals_adapter(wide_hub: Path, tmp_path: Path, dora: bool) -> None:
    train = settings(tmp_path / "out", **{**LORA, "lora": Lora(rank=4, alpha=8, dora=dora)})
    model = run(write_llava(tmp_path), train, chosen(wide_hub, train))
    expected = logits(model)
    merge_lora(model)
    assert not is_quantised(model.llm)
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)
    model.llm.save_pretrained(tmp_path / "merged")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert not is_quantised(again)
    assert torch.equal(again.model.layers[0].mlp.up_proj.weight, model.llm.model.layers[0].mlp.up_proj.weight)


def test_next_stage_without_four_bits_starts_where_qlora_ended(
    wide_hub: Path, stage: tuple[Path, torch.Tensor], tmp_path: Path
) -> None:
    """The adapter is right on the rounded weights alone: so they are rounded, and saved, since the Hub has others."""
    folder, expected = stage
    model = build(wide_hub, quantisation=None)
    load_stage(model, folder)
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-5)
    choose_trainable(model, WHOLE, None)
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-5)
    parts, train = config(wide_hub, quantisation=None), settings(tmp_path, learning_rate=WHOLE)
    save(tmp_path, model, parts, train)
    again = build(wide_hub, quantisation=None)
    load_stage(again, tmp_path)
    assert torch.equal(logits(again), logits(model))


def test_stage_that_trained_the_whole_llm_can_go_on_in_four_bits(wide_hub: Path, tmp_path: Path) -> None:
    """Its weights are no Hub's: packed they lie in the stage that follows, and only there."""
    full = settings(tmp_path / "full", steps=2, learning_rate=WHOLE)
    data = write_llava(tmp_path)
    save(full.output_dir, run(data, full, chosen(wide_hub, full, quantisation=None)), config(wide_hub), full)
    qlora = settings(tmp_path / "qlora", steps=2, **LORA)
    model = build(wide_hub)
    load_stage(model, full.output_dir)
    other = build(wide_hub, quantisation=None)
    load_stage(other, full.output_dir)
    quantise(other.llm, torch.float32)
    assert torch.equal(logits(model), logits(other))
    choose_trainable(model, qlora.learning_rate, qlora.lora)
    trained = run(data, qlora, model)
    save(qlora.output_dir, trained, config(wide_hub), qlora)
    again = build(wide_hub)
    load_stage(again, qlora.output_dir)
    assert torch.equal(logits(again), logits(trained))
    with pytest.raises(ValueError, match="holds 4-bit weights"):
        load_stage(build(wide_hub, quantisation=None), qlora.output_dir)


def on_rank(rank: int, engines: list[str], hub: Path, data: Path, folder: Path) -> None:
    for engine in engines:
        accelerator = start_engine(engine)
        train = settings(folder / engine, steps=2, rows_per_micro_batch=1, max_grad_norm=0.5, **LORA)
        model = run(data, train, chosen(hub, train), accelerator=accelerator)
        save_stage(train.output_dir, model, make_processor(), yaml.safe_dump({"model": {}}), rank == 0)
        packed = [p for p in model.parameters() if is_4bit(p)]
        ran = {"type": accelerator.distributed_type.value, "sharded": [p.numel() for p in packed] == [0] * len(packed)}
        (folder / f"{engine}-{rank}.json").write_text(json.dumps(ran))
        accelerator.wait_for_everyone()
    torch.distributed.destroy_process_group()


@pytest.mark.recipe
def test_two_ranks_leave_the_stage_of_one_process(wide_hub: Path, tmp_path: Path) -> None:
    pytest.importorskip("deepspeed")
    engines = ["ddp", "zero2", "zero3"]
    data = write_llava(tmp_path)
    on_two_ranks(on_rank, engines, wide_hub, data, tmp_path)
    train = settings(tmp_path / "one", steps=2, max_grad_norm=0.5, **LORA)
    one = run(data, train, chosen(wide_hub, train))
    expected = logits(one)
    for engine in engines:
        ran = json.loads((tmp_path / f"{engine}-1.json").read_text())
        assert ran == {"type": "MULTI_CPU" if engine == "ddp" else "DEEPSPEED", "sharded": engine == "zero3"}
        model = build(wide_hub)
        load_stage(model, tmp_path / engine)
        torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4, msg=engine)
