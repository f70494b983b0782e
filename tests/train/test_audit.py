"""The audit: what should move moved and nothing else did, and the stage on disk says what the model in memory said."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file

from conftest import make_model, make_processor, write_llava
from engines import config_that_shards_all, start
from mllm.config import RunConfig, dump_config
from mllm.data.loader import DataConfig
from mllm.models.build import ModelConfig, build_model
from mllm.models.multimodal import MultimodalLM
from mllm.reload import check_reload, compare, probe
from mllm.stage import check_written, close_stage
from mllm.train import checkpoint
from mllm.train.audit import fingerprint, held
from mllm.train.settings import TrainConfig
from mllm.train.stage_folder import save_stage
from mllm.train.trainable import LearningRates, choose_trainable
from mllm.train.tuning import compiling
from mllm.train.tuning.adapters import Lora
from models.test_image_newline import anyres_processor
from runs import LORA, on_two_ranks, run, settings

ALL = {"learning_rate": LearningRates(connector=1e-2, llm=1e-3, vision_encoder=1e-3)}
BOTH = {**ALL, "lora": Lora(rank=4, alpha=8, dora=True), "vision_lora": Lora(rank=4, alpha=8)}


def quick(folder: Path, **changes: Any) -> TrainConfig:
    return settings(folder, **{"steps": 2, "audit": "quick"} | changes)


def chosen(hub: Path, train: TrainConfig, **more: Any) -> tuple[ModelConfig, MultimodalLM]:
    parts = ModelConfig(str(hub / "encoder"), str(hub / "llm"), **more)
    torch.manual_seed(1)
    model = build_model(parts, make_processor().image_token_id)
    choose_trainable(model, train.learning_rate, train.lora, train.vision_lora)
    return parts, model


def stage(
    hub: Path, data: Path, train: TrainConfig, accelerator: Accelerator | None = None, **more: Any
) -> tuple[dict[str, Any], MultimodalLM]:
    """A run to its end; the audit's file, and the model."""
    parts, model = chosen(hub, train, **more)
    accelerator = accelerator or Accelerator(cpu=True)
    run(data, train, model, accelerator=accelerator)
    config, processor = RunConfig(train=train, model=parts), make_processor()
    save_stage(train.output_dir, model, processor, dump_config(config), accelerator.is_main_process)
    check_written(accelerator, config, model, processor)
    accelerator.wait_for_everyone()
    return json.loads((train.output_dir / "audit.json").read_text()), model


@pytest.mark.parametrize("what", [{}, LORA, ALL, BOTH], ids=["connector", "lora", "whole", "adapters on both"])
def test_run_without_mistakes_passes_and_reads_back_to_the_last_bit(hub: Path, tmp_path: Path, what: Any) -> None:
    report, model = stage(hub, write_llava(tmp_path), quick(tmp_path / "out", **what))
    assert report["ok"]
    assert report["end"]["never_moved"] == report["end"]["frozen_but_moved"] == []
    assert report["end"]["declared"] == sum(p.requires_grad for p in model.parameters())
    assert report["end"]["declared"] + report["end"]["frozen"] == len(list(model.parameters()))
    assert report["reload"]["process"] == "same"
    assert report["reload"]["difference"] == 0.0
    assert ("merged_difference" in report["reload"]) == ("lora" in what)
    assert report["reload"].get("merged_difference", 0.0) < 1e-5


def test_fresh_process_reads_the_same_logits_of_qlora_and_merges_to_them(
    hub: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: pip install 'mllm[quantize]'")
    train = settings(tmp_path / "out", steps=2, **LORA)  # `full` is the default
    report, _ = stage(hub, write_llava(tmp_path), train, quantisation="nf4")
    assert report["mode"] == "full"
    assert report["reload"]["process"] == "fresh"
    assert report["reload"]["difference"] == 0.0
    assert report["reload"]["merged_difference"] < 1e-5
    assert "read back in a fresh process" in capsys.readouterr().out


def test_half_precision_reads_back_to_the_last_bit(hub: Path, tmp_path: Path) -> None:
    """What trained whole is float32 in memory and on disk, and bfloat16 in a chat: compared is what was in memory."""
    report, _ = stage(hub, write_llava(tmp_path), quick(tmp_path / "out", **ALL), dtype="bfloat16")
    assert (report["ok"], report["reload"]["difference"]) == (True, 0.0)
    frozen, _ = stage(hub, write_llava(tmp_path), quick(tmp_path / "lora", **LORA), dtype="bfloat16")
    assert (frozen["ok"], frozen["reload"]["difference"], frozen["reload"]["dtype"]) == (True, 0.0, "bfloat16")
    assert frozen["reload"]["merged_difference"] < 1e-5


@pytest.mark.parametrize(
    "what", [{"feature_cache": 1}, {"encoder_batch": 3}, {"compile": True}], ids=["cache", "groups", "compiled"]
)
def test_stage_of_tiles_is_asked_without_what_training_alone_sets_and_reads_back_to_the_last_bit(
    hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: Any
) -> None:
    """Groups of images, and compiled blocks, add in another order. The picture asked about is 5 tiles: no group's size
    before."""
    called: list[int] = []

    def backend(graph: Any, _: Any) -> Any:
        return lambda *inputs: called.append(1) or graph(*inputs)  # type: ignore[func-returns-value]

    monkeypatch.setattr(compiling, "BACKEND", backend)
    processor, train = anyres_processor(), quick(tmp_path / "out", **LORA, **what)
    parts = ModelConfig(str(hub / "encoder"), str(hub / "llm"))
    torch.manual_seed(1)
    model = build_model(parts, processor.image_token_id, layout=processor.layout)
    choose_trainable(model, train.learning_rate, train.lora)
    accelerator = Accelerator(cpu=True)
    run(write_llava(tmp_path), train, model, accelerator=accelerator, processor=processor)
    config = RunConfig(train=train, model=parts, data=DataConfig(tiles="anyres"))
    save_stage(train.output_dir, model, processor, dump_config(config))
    before, calls = (model.feature_cache, model.encoder_batch, model.fewest_images), len(called)
    assert bool(calls) == train.compile
    assert check_reload(accelerator, model, processor, train.output_dir, "quick")["difference"] == 0.0
    assert len(called) == calls, "compiled blocks were asked, which a stage that is read back has none of"
    assert before == (model.feature_cache, model.encoder_batch, model.fewest_images)


def test_weight_that_never_moves_is_named_in_a_warning(
    hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As where a connector has a weight that its forward pass forgot."""
    train = quick(tmp_path / "out", save_every=1)
    _, model = chosen(hub, train)
    model.connector.register_parameter("forgotten", torch.nn.Parameter(torch.ones(3)))
    run(write_llava(tmp_path), train, model)
    report = json.loads((train.output_dir / "audit.json").read_text())
    assert report["first_save"]["never_moved"] == report["end"]["never_moved"] == ["connector.forgotten"]
    assert "have not moved in 1 steps: connector.forgotten" in " ".join(capsys.readouterr().out.split())


def disturbed(hub: Path, train: TrainConfig) -> tuple[ModelConfig, MultimodalLM]:
    """A model one of whose frozen weights drifts in every pass."""
    parts, model = chosen(hub, train)

    def drift(*_: Any) -> None:
        model.llm.model.norm.weight.data.add_(1e-3)

    model.connector.register_forward_pre_hook(drift)
    return parts, model


def test_frozen_weight_that_moves_stops_the_run_at_its_first_checkpoint(hub: Path, tmp_path: Path) -> None:
    train = quick(tmp_path / "out", save_every=1)
    with pytest.raises(ValueError, match=r"1 frozen weights moved: llm\.model\.norm\.weight"):
        run(write_llava(tmp_path), train, disturbed(hub, train)[1])


def test_frozen_weight_that_moves_fails_the_stage_behind_its_end_with_all_files_in_place(
    hub: Path, tmp_path: Path
) -> None:
    train = quick(tmp_path / "out")
    parts, model = disturbed(hub, train)
    accelerator = Accelerator(cpu=True)
    run(write_llava(tmp_path), train, model, accelerator=accelerator)
    with pytest.raises(ValueError, match=r"the audit failed: 1 frozen weights moved.*audit\.json"):
        close_stage(accelerator, RunConfig(train=train, model=parts), model, make_processor())
    assert not json.loads((train.output_dir / "audit.json").read_text())["ok"]
    assert (train.output_dir / "connector.safetensors").is_file()


@pytest.mark.parametrize("what", [LORA, BOTH], ids=["lora", "dora"])
def test_matrix_that_cannot_move_in_the_first_step_is_no_warning(hub: Path, tmp_path: Path, what: Any) -> None:
    """B is zero, so A has no gradient yet."""
    train = quick(tmp_path / "out", steps=2, save_every=1, **what)
    report, _ = stage(hub, write_llava(tmp_path), train)
    assert report["first_save"]["never_moved"] == []
    assert report["first_save"]["steps"] == 1


@pytest.mark.parametrize("change", ["empty", "other", "missing", "extra"])
def test_checkpoint_that_does_not_hold_what_is_in_memory_stops_the_run(
    hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    """ZeRO-3 with LoRA writes empty tensors elsewhere."""
    own = checkpoint.save_tensors

    def spoiled(tensors: dict[str, torch.Tensor], path: Path, *more: Any) -> None:
        if path.name == "trained.safetensors":
            name = min(tensors)
            spoil = {"empty": torch.empty(0), "other": tensors[name] + 1e-6}
            tensors = {**tensors, **({name: spoil[change]} if change in spoil else {})}
            if change == "missing":
                del tensors[name]
            if change == "extra":
                tensors["extra"] = torch.ones(1)
        own(tensors, path, *more)

    monkeypatch.setattr(checkpoint, "save_tensors", spoiled)
    train = quick(tmp_path / "out", save_every=1, **LORA)
    with pytest.raises(
        ValueError, match="does not hold what is in memory: " + ("extra" if change == "extra" else "conn")
    ):
        run(write_llava(tmp_path), train, chosen(hub, train)[1])


def test_stage_that_says_something_else_is_an_error_with_both_numbers(
    hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = quick(tmp_path / "out", **LORA)
    _, model = stage(hub, write_llava(tmp_path), train)
    file = train.output_dir / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if "lora_B" in name)
    save_file({**tensors, name: torch.zeros_like(tensors[name])}, file)
    found = check_reload(Accelerator(cpu=True), model, make_processor(), train.output_dir, "quick")
    assert found["difference"] > found["tolerance"] == 1e-4
    assert "says something else than the model that was trained" in found["error"]
    monkeypatch.setattr(sys, "executable", "/bin/false")
    broken = check_reload(Accelerator(cpu=True), model, make_processor(), train.output_dir, "full")
    assert "could not be read back" in broken["error"]


def test_numbers_that_are_none_are_not_equal(hub: Path, tmp_path: Path) -> None:
    train = quick(tmp_path / "out")
    _, model = stage(hub, write_llava(tmp_path), train)
    logits = probe(model, make_processor(), torch.device("cpu"))
    found = compare(train.output_dir, {"logits": logits * float("nan"), "dtypes": {"x": torch.float32}})
    assert "error" in found


def test_off_leaves_nothing(hub: Path, tmp_path: Path) -> None:
    train = quick(tmp_path / "out", audit="off", save_every=1)
    parts, model = chosen(hub, train)
    accelerator = Accelerator(cpu=True)
    run(write_llava(tmp_path), train, model, accelerator=accelerator)
    close_stage(accelerator, RunConfig(train=train, model=parts), model, make_processor())
    assert not (train.output_dir / "audit.json").exists()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
@pytest.mark.parametrize("every", [True, False])
def test_fingerprint_sees_a_change_and_not_the_order_of_adding(dtype: torch.dtype, every: bool) -> None:
    tensor = torch.randint(0, 100, (70_000,), generator=torch.Generator().manual_seed(0)).to(dtype)
    before = fingerprint(tensor, every)
    assert fingerprint(tensor.clone(), every) == before
    assert fingerprint(tensor.flip(0), True) == fingerprint(tensor, True)
    changed = tensor + 1
    assert fingerprint(changed, every) != before
    one = tensor.clone()
    one[33_333] += 1
    assert fingerprint(one, True) != fingerprint(tensor, True)
    assert fingerprint(held(torch.nn.Parameter(torch.zeros(0))), every) == (0, 0)


ENGINES = {"ddp": {}, "zero2": {}, "zero3": {"quantisation": "nf4"}, "fsdp2": {}}
"""Two ranks, LoRA, and under stage 3 four bits."""


def on_rank(rank: int, hub: Path, data: Path, folder: Path) -> None:
    for engine, more in ENGINES.items():
        accelerator = start(engine, folder)
        train = quick(folder / engine, rows_per_micro_batch=1, save_every=1, **LORA)
        report, _ = stage(hub, data, train, accelerator, **more)
        assert report["ok"], (engine, report)
    torch.distributed.destroy_process_group()


@pytest.mark.recipe
def test_two_ranks_pass_under_every_engine(hub: Path, tmp_path: Path) -> None:
    pytest.importorskip("deepspeed", reason="deepspeed is not installed: pip install 'mllm[deepspeed]'")
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: pip install 'mllm[quantize]'")
    for engine in ("zero2", "zero3"):
        (tmp_path / f"{engine}.json").write_text(config_that_shards_all(engine))
    on_two_ranks(on_rank, hub, write_llava(tmp_path), tmp_path)
    for engine in ENGINES:
        report = json.loads((tmp_path / engine / "audit.json").read_text())
        assert report["first_save"]["file"] == []
        assert report["end"]["never_moved"] == report["end"]["frozen_but_moved"] == []
        assert report["reload"]["difference"] < 1e-5
        assert report["reload"]["merged_difference"] < 1e-5


def test_the_question_is_asked_in_full_float32_and_settings_are_put_back() -> None:
    model, processor, seen = make_model(), make_processor(), []
    precision: Any = torch.backends.cudnn.conv
    before = precision.fp32_precision
    model.vision_encoder.register_forward_pre_hook(lambda *_: seen.append(precision.fp32_precision))
    probe(model, processor, torch.device("cpu"))
    assert seen == ["ieee"]
    assert precision.fp32_precision == before != "ieee"
