"""The largest micro-batch is found, computed once before the first step, and nothing is learned from it."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from conftest import make_model, make_processor, write_llava
from mllm.data.formats.llava import LlavaSource
from mllm.data.index import Index, build_index
from mllm.data.loader import DataConfig, PlannedBatches, Share
from mllm.data.plan import Plan
from mllm.data.streams.batches import look, open_stream
from mllm.models.connectors import AvgPoolConnector
from mllm.train.forecasting import probe as room
from mllm.train.forecasting.forecast import Forecast, feature_bytes, forecast
from mllm.train.forecasting.largest import largest
from mllm.train.forecasting.needs import refuse, rows, warnings
from mllm.train.forecasting.probe import Probe, made_up, probe
from mllm.train.forecasting.shadow import Shape
from mllm.train.losses import num_supervised
from mllm.train.route import make_plan
from mllm.train.settings import TrainConfig
from mllm.train.trainable import choose_trainable
from runs import LORA, SEQ_LENGTH, chosen_model, metrics, on_two_ranks, run, settings, weights

SHAPE = Shape(rows=2, length=64, images=3, supervised=20)


def mixed(folder: Path) -> Path:
    """Records of 1 to 4 turns, every third without its picture."""
    path = write_llava(folder, 24, turns=4)
    records = json.loads(path.read_text())
    for number, record in enumerate(records):
        record["conversations"] = record["conversations"][: 2 * (1 + number % 4)]
        if number % 3 == 0:
            del record["image"]
            record["conversations"][0]["value"] = record["conversations"][0]["value"].removeprefix("<image>\n")
    path.write_text(json.dumps(records))
    return path


def indexed(path: Path) -> tuple[Index, DataConfig]:
    data = DataConfig([LlavaSource(path=path)], seq_length=SEQ_LENGTH, num_workers=0)
    return build_index(data.sources, make_processor(), SEQ_LENGTH, progress=False), data


def forecast_of(train: TrainConfig, data: Path, accelerator: Accelerator | None = None, model: Any = None) -> Forecast:
    """As `check_run` asks for it."""
    index, config = indexed(data)
    plan = make_plan(index, config, train)
    model = model or chosen_model(train)
    assert isinstance(plan, Plan)
    return forecast(accelerator or Accelerator(cpu=True), model, index, plan, make_processor(), train, steps=4)


def test_made_up_batch_has_the_shape_that_was_asked_for() -> None:
    model = chosen_model(settings(Path()))
    batch = made_up(model, SHAPE, 4)
    assert batch["input_ids"].shape == (2, 64)
    assert int((batch["input_ids"] == model.image_token_id).sum()) == 3 * 4
    assert num_supervised(batch) == 20
    assert len(batch["pixel_values"]) == batch["num_images"] == 3
    assert num_supervised(made_up(model, Shape(2, 8, 0, 14), 4)) == 14  # all but the first of each row


def test_probe_leaves_weights_gradients_and_random_numbers_as_they_were(tmp_path: Path) -> None:
    model = chosen_model(settings(tmp_path, **LORA))
    model.train()
    before, state = weights(model), torch.get_rng_state()
    found = probe(Accelerator(cpu=True), model, SHAPE, 4, "no")
    assert found.fits
    assert found.seconds > 0
    assert found.passing > 100_000
    assert all(torch.equal(old, new) for old, new in zip(before.values(), weights(model).values(), strict=True))
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("changes", [{}, LORA, {"gradient_checkpointing": True}, {"feature_cache": 1}])
def test_a_run_that_was_probed_has_the_losses_of_one_that_was_not(tmp_path: Path, changes: dict[str, Any]) -> None:
    data = mixed(tmp_path)
    plain, probed = settings(tmp_path / "plain", **changes), settings(tmp_path / "probed", **changes)
    run(data, plain)
    model = chosen_model(probed)
    told = forecast_of(probed, data, model=model)
    assert told.probed is not None
    run(data, probed, model)
    assert metrics(tmp_path / "probed") == metrics(tmp_path / "plain")


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("rows", [1, 2, 4])
def test_no_micro_batch_of_the_plan_is_larger_than_the_largest(tmp_path: Path, packing: bool, rows: int) -> None:
    """By the rough bytes that tell which is the heaviest."""
    from mllm.train.forecasting.largest import weight

    index, data = indexed(mixed(tmp_path))
    data.packing = packing
    train = settings(tmp_path / "run", rows_per_micro_batch=rows)
    model, plan = chosen_model(train), make_plan(index, data, train)
    assert isinstance(plan, Plan)
    shape = largest(model, index, plan, rows)
    dataset = PlannedBatches(index, plan, make_processor(), Share(0, 1, rows))
    steps = plan.steps(1)
    for batch in map(dataset.__getitem__, dataset.items(0, steps)):
        count, length = batch["input_ids"].shape
        assert weight(model, Shape(count, length, batch["num_images"], num_supervised(batch))) <= weight(model, shape)
    assert shape.rows == rows


def test_of_a_stream_rows_are_taken_to_be_full_of_the_densest_samples(tmp_path: Path) -> None:
    data = DataConfig([LlavaSource(path=mixed(tmp_path))], seq_length=SEQ_LENGTH, stream=True, num_workers=0)
    stream, train = open_stream(data, make_processor(), seed=0), settings(tmp_path / "run")
    shape = largest(chosen_model(train), look(stream), make_plan(stream, data, train), 2)
    assert shape.rows == 2
    assert SEQ_LENGTH / 2 < shape.length <= SEQ_LENGTH
    assert shape.supervised > 2


def test_forecast_tells_time_tokens_and_disk_that_add_up(tmp_path: Path) -> None:
    train = settings(tmp_path / "run", save_every=2, learning_rate=LORA["learning_rate"])  # the LLM whole
    told = forecast_of(train, mixed(tmp_path))
    numbers = told.as_json()
    assert told.probed is not None
    assert told.seconds == told.probed.seconds * 2  # 4 rows a step, 2 at a time
    assert numbers["eta_seconds"] == told.seconds * 4
    assert numbers["tokens_per_second"] == pytest.approx(told.tokens / told.seconds)
    assert numbers["fits"]
    assert json.loads(json.dumps(numbers)) == numbers
    run(mixed(tmp_path), train)
    written = sum(file.stat().st_size for file in (tmp_path / "run" / "checkpoints" / "step-4").iterdir())
    assert told.disk.checkpoint == pytest.approx(written, rel=0.1)  # names come on top of tiny tensors
    assert told.disk.needed > 3 * told.disk.checkpoint  # two are kept, while one more is written
    assert 0 < told.disk.stage < told.disk.checkpoint


def test_time_is_worked_out_from_operations_where_nothing_was_timed(tmp_path: Path) -> None:
    told = forecast_of(settings(tmp_path / "run", probe=False), mixed(tmp_path))
    assert told.probed is None
    assert told.why == "train.probe is off"
    assert told.seconds > 0
    assert told.flops > 0


def test_weights_that_are_not_read_yet_are_predicted_and_not_probed(tmp_path: Path) -> None:
    train = settings(tmp_path / "run")
    model = chosen_model(train)
    model.llm.to("meta")
    told = forecast_of(train, mixed(tmp_path), model=model)
    assert told.probed is None
    assert "not read yet" in told.why
    assert told.memory is not None
    assert told.memory.peak == forecast_of(train, mixed(tmp_path)).memory.peak  # type: ignore[union-attr]


def test_kept_features_count_where_they_lie_on_the_device(tmp_path: Path) -> None:
    told = forecast_of(settings(tmp_path / "run", feature_cache=1, probe=False), mixed(tmp_path))
    assert told.memory is not None
    assert told.memory.parts["feature cache"] == 16 * 4 * 24 * 4  # images, patches, width, bytes


def test_kept_features_that_are_pooled_count_as_they_are_kept(tmp_path: Path) -> None:
    model, train = make_model(connector=AvgPoolConnector(tokens=1)), settings(tmp_path / "run", feature_cache=1)
    choose_trainable(model, train.learning_rate, None)
    index, _ = indexed(mixed(tmp_path))
    for precision, number in (("no", 4), ("bf16", 2)):
        train.mixed_precision = precision
        assert feature_bytes(model, index, train, 1.0) == 16 * 1 * 24 * number  # images, token, width, bytes


def test_folder_of_features_counts_as_disk_up_to_its_limit(tmp_path: Path) -> None:
    def features(**more: Any) -> int:
        train = settings(tmp_path / "run", feature_cache_dir=tmp_path / "features", probe=False, **more)
        return forecast_of(train, mixed(tmp_path)).disk.features

    whole = 16 * 4 * 24 * 4  # images, patches, width, bytes
    assert features() == whole
    assert features(feature_cache_dir_gigabytes=1000 / 2**30) == 1000
    (tmp_path / "features").mkdir()
    (tmp_path / "features" / "a.features").write_bytes(bytes(384))
    assert features() == whole - 384


def runs_out(*_: Any) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def test_memory_that_runs_out_stops_before_the_first_step_and_names_what_would_help(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "run", runs_out)
    whole = {"learning_rate": LORA["learning_rate"]}
    told = forecast_of(settings(tmp_path / "run", rows_per_micro_batch=1, **whole), mixed(tmp_path))
    assert told.probed == Probe(0.0, 0, fits=False)
    assert not told.fits
    with pytest.raises(ValueError, match=r"out of memory.*gradient_checkpointing.*lora"):
        refuse(told)
    halved = forecast_of(settings(tmp_path / "run", **whole), mixed(tmp_path))
    refuse(halved)  # of two rows, one at a time may fit
    assert any("halves" in words for words in warnings(halved))


@pytest.mark.parametrize("engine", ["zero 2", "zero 3", "fsdp2"])
def test_run_that_cannot_halve_says_so_before_it_starts_and_does_not_start_where_the_probe_shows_it(
    engine: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train, data, accelerator = settings(tmp_path / "run", **LORA), mixed(tmp_path), Accelerator(cpu=True)
    assert not any(name == "out of memory" for name, _ in rows(forecast_of(train, data)))
    monkeypatch.setattr(room, "run", runs_out)
    if engine == "fsdp2":
        monkeypatch.setattr("mllm.train.engines.fsdp.requested", lambda: True)
    else:
        monkeypatch.setattr("mllm.train.engines.zero.stage", lambda _: int(engine[-1]))
        plugin = SimpleNamespace(deepspeed_config={"zero_optimization": {}})
        monkeypatch.setattr(type(accelerator.state), "deepspeed_plugin", plugin)
    told = forecast_of(train, data, accelerator)
    words = dict(rows(told))
    assert words["out of memory"].startswith("ends the run: computing in halves is off under ZeRO and FSDP2")
    assert not any("halves" in words for words in warnings(told))
    if engine == "zero 2":
        with pytest.raises(ValueError, match=r"micro-batch, 2 rows of .*train\.rows_per_micro_batch 1"):
            refuse(told)
    else:
        assert words["probe"].startswith("none: off under ZeRO stage 3 and FSDP2, where each rank")
        refuse(told)
        model = chosen_model(train)
        model.llm.lm_head.to("meta")  # as where the LLM is read into its shards
        assert dict(rows(forecast_of(train, data, accelerator, model)))["probe"] == words["probe"]


def test_any_other_error_of_the_probe_is_the_users_to_see(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def breaks(*_: Any) -> None:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(room, "run", breaks)
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        forecast_of(settings(tmp_path / "run"), mixed(tmp_path))


def told_by_rank(rank: int, folder: Path, data: Path) -> None:
    train = settings(folder / "run", rows_per_micro_batch=1)
    told = forecast_of(train, data, Accelerator(cpu=True))
    (folder / f"{rank}.json").write_text(json.dumps(told.as_json()))
    torch.distributed.destroy_process_group()


def test_two_ranks_tell_the_same(tmp_path: Path) -> None:
    on_two_ranks(told_by_rank, tmp_path, mixed(tmp_path))
    one, two = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert one.pop("disk")["needed"] == two.pop("disk")["needed"]  # what is free may change meanwhile
    assert one == two
    assert one["memory_per_rank"]["parts"]["buckets"] > 0


def test_counts_of_rows_are_those_of_their_samples(tmp_path: Path) -> None:
    index, data = indexed(mixed(tmp_path))
    train = settings(tmp_path / "run", rows_per_micro_batch=1)
    plan = make_plan(index, data, train)
    assert isinstance(plan, Plan)
    shape = largest(chosen_model(train), index, plan, 1)
    rows = [row for step in range(plan.steps(1)) for row in plan.rows(step)]
    told = {(int(np.sum(index.images[row])), int(np.sum(index.supervised[row]))) for row in rows}
    assert (shape.images, shape.supervised) in told
