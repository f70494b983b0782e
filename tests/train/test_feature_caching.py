"""`train.feature_cache_dir`: the run is the same, over epochs, a second run and two ranks; and does it pay?"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator

from conftest import make_model, make_processor
from mllm.models.connectors import AvgPoolConnector
from mllm.models.feature_cache import GROUP, FeatureCache
from mllm.models.feature_folder import FeatureFolder
from mllm.models.image_groups import filled_up
from mllm.models.stored_features import StoredFeatures
from mllm.train import engine
from mllm.train.feature_caching import description
from mllm.train.forecasting.feature_probe import Measured, measure, verdict
from mllm.train.trainable import LearningRates, choose_trainable
from runs import chosen_model, metrics, on_two_ranks, run, settings, start_engine, write_llava

MS = 1e-3


def numbers(folder: Path) -> list[tuple[float, ...]]:
    return metrics(folder, "loss", "grad_norm")


@pytest.mark.parametrize("rows", [1, 4])
def test_runs_with_a_folder_have_the_losses_of_kept_features_bit_for_bit(tmp_path: Path, rows: int) -> None:
    data = write_llava(tmp_path, 8)
    plain = {"steps": 6, "rows_per_micro_batch": rows}
    run(data, settings(tmp_path / "kept", feature_cache=1.0, **plain))
    run(data, settings(tmp_path / "live", **plain))
    for name in ("first", "second"):
        train = settings(tmp_path / name, feature_cache_dir=tmp_path / "features", **plain)
        model = chosen_model(train)
        seen: list[int] = []
        model.vision_encoder.register_forward_pre_hook(lambda _, given, seen=seen: seen.append(len(given[0])))
        run(data, train, model)
        assert numbers(tmp_path / name) == numbers(tmp_path / "kept")
        groups = seen.count(GROUP)
        assert groups == 2 if name == "second" else groups > 2  # the second run encodes for the probe alone
    live = [number for line in numbers(tmp_path / "live") for number in line]
    assert [n for line in numbers(tmp_path / "first") for n in line] == pytest.approx(live, rel=1e-5)


def on_rank(rank: int, data: Path, folder: Path) -> None:
    for name in ("two", "again"):
        accelerator = start_engine("ddp")
        train = settings(folder / name, steps=6, rows_per_micro_batch=1, feature_cache_dir=folder / "features")
        run(data, train, accelerator=accelerator)
        accelerator.wait_for_everyone()
    torch.distributed.destroy_process_group()


def test_two_ranks_share_a_folder_and_have_the_losses_of_one(tmp_path: Path) -> None:
    data = write_llava(tmp_path, 8)
    run(data, settings(tmp_path / "one", steps=6, rows_per_micro_batch=1))
    on_two_ranks(on_rank, data, tmp_path)
    one = [number for line in numbers(tmp_path / "one") for number in line]
    for name in ("two", "again"):
        assert [n for line in numbers(tmp_path / name) for n in line] == pytest.approx(one, rel=1e-5)
    assert 1 <= len(list((tmp_path / "features").glob("*.keys"))) <= 2


def test_run_with_other_weights_of_the_encoder_is_refused(tmp_path: Path) -> None:
    data, train = write_llava(tmp_path, 4), settings(tmp_path / "run", steps=1, feature_cache_dir=tmp_path / "features")
    run(data, train)
    other = chosen_model(train)
    with torch.no_grad():
        next(other.vision_encoder.parameters()).add_(1e-3)
    with pytest.raises(ValueError, match=r"of another kind \(encoder weights: [^;]*\)"):
        run(data, train, other)


def test_description_tells_what_was_changed() -> None:
    def told(change: Callable[[object, object], None]) -> set[str]:
        model, processor = make_model(), make_processor()
        plain = description(model.vision_encoder, processor, torch.device("cpu"), "no")
        change(model.vision_encoder, processor)
        found = description(model.vision_encoder, processor, torch.device("cpu"), "no")
        return {name for name in plain if plain[name] != found[name]}

    def other_mean(encoder: object, processor: object) -> None:
        processor.image_processor.image_mean = [0.5, 0.5, 0.5]  # type: ignore[attr-defined]

    def other_layer(encoder: object, processor: object) -> None:
        encoder.taps = [0]  # type: ignore[attr-defined]

    def other_dtype(encoder: object, processor: object) -> None:
        encoder.bfloat16()  # type: ignore[attr-defined]

    def nothing(encoder: object, processor: object) -> None:
        encoder.model.config._name_or_path = "moved/elsewhere"  # type: ignore[attr-defined]

    assert told(other_mean) == {"image processor"}
    assert told(other_layer) == {"feature layers"}
    assert told(other_dtype) == {"encoder weights"}
    assert told(nothing) == set()


def test_folder_is_refused_beside_memory_where_the_encoder_trains_and_where_it_is_sharded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, asked = write_llava(tmp_path, 4), {"feature_cache_dir": tmp_path / "features"}
    with pytest.raises(ValueError, match="set one of them"):
        run(data, settings(tmp_path, feature_cache=1.0, **asked))
    with pytest.raises(ValueError, match="feature_cache_dir keeps features of a frozen encoder"):
        run(data, settings(tmp_path, learning_rate=LearningRates(vision_encoder=1e-3), **asked))
    monkeypatch.setattr(engine, "shards_weights", lambda accelerator: True)
    with pytest.raises(ValueError, match="feature_cache_dir where the encoder is sharded"):
        engine.check(Accelerator(cpu=True), settings(tmp_path, **asked))
    assert not (tmp_path / "features").exists()


ONE = AvgPoolConnector(tokens=1)
"""Of four patches one token."""


def pooled_run(data: Path, folder: Path, connector: AvgPoolConnector = ONE, **changes: Any) -> list[tuple[float, ...]]:
    train = settings(folder, steps=6, **changes)
    model = make_model(connector=connector)
    choose_trainable(model, train.learning_rate, None)
    run(data, train, model, processor=make_processor(connector.tokens))
    return numbers(folder)


def test_pooled_features_are_kept_in_the_place_of_all_and_the_run_is_the_same(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, folder = write_llava(tmp_path, 8), tmp_path / "features"
    kept = pooled_run(data, tmp_path / "kept", feature_cache=1.0)
    for name in ("first", "second"):
        assert pooled_run(data, tmp_path / name, feature_cache_dir=folder) == kept
    live = pooled_run(data, tmp_path / "live")
    assert [n for line in kept for n in line] == pytest.approx([n for line in live for n in line], rel=1e-5)
    size = 24 * 4  # width, bytes: a quarter of four patches
    assert sum(path.stat().st_size for path in folder.glob("*.features")) == 8 * size
    assert f"{size} bytes/image" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"pooling: mean, 1 x 1 there, None here") as told:
        run(data, settings(tmp_path / "whole", feature_cache_dir=folder))
    assert "encoder" not in str(told.value).split("(")[1]


@pytest.mark.parametrize("mixed_precision", ["no", "bf16"])
def test_kept_pooled_features_are_those_of_the_encoder_bit_for_bit(tmp_path: Path, mixed_precision: str) -> None:
    model, shown = make_model(connector=ONE).requires_grad_(False).eval(), torch.rand(11, 3, 28, 28)
    with torch.autocast("cpu", torch.bfloat16, enabled=mixed_precision == "bf16"):
        whole = torch.cat([filled_up(model.vision_encoder, group, GROUP) for group in shown.split(GROUP)])
        live = model.connector[0](whole)
        if mixed_precision == "bf16":
            live = live.bfloat16()
        folder = FeatureFolder(tmp_path, {}, tuple(live.shape[1:]), live.dtype, 1.0)
        stored = StoredFeatures(folder, pin=False)
        for cache in (FeatureCache(1.0), stored, stored):
            model.feature_cache = cache
            assert torch.equal(model.features(shown), live)


def test_another_pooling_is_another_folder_and_all_patches_are_none(tmp_path: Path) -> None:
    data, folder = write_llava(tmp_path, 4), tmp_path / "features"
    pooled_run(data, tmp_path / "whole", AvgPoolConnector(tokens=4), feature_cache_dir=folder)
    run(data, settings(tmp_path / "mlp", feature_cache_dir=folder))  # four of four patches: as of any connector
    with pytest.raises(ValueError, match=r"pooling: None there, mean, 1 x 1 here; shape: \[4, 24\] there, \[1, 24\]"):
        pooled_run(data, tmp_path / "one", feature_cache_dir=folder)


def clock_of(*times: float) -> Callable[[], float]:
    """Encoding begins and ends, writing begins and ends, reading ends."""
    ticks: Iterator[float] = iter(times)
    return lambda: next(ticks)


@pytest.mark.parametrize(
    ("times", "uses", "kept", "said"),
    [
        ((0, 80 * MS, 1, 1.008, 1.016), 3.0, 0, "pays from the second epoch on"),
        ((0, 80 * MS, 1, 1.008, 1.016), 1.0, 0, "does not pay in this run, which sees an image once"),
        ((0, 80 * MS, 1, 1.008, 1.016), 1.0, 100, "pays from the first epoch on"),
        ((0, 80 * MS, 1, 1.008, 1.016), None, 0, "pays where an image is seen again"),
        ((0, 4 * MS, 1, 1.008, 1.016), 3.0, 0, "does not pay: reading is no faster than encoding"),
        ((0, 80 * MS, 1, 9.0, 9.008), 3.0, 0, "does not pay in 3 epochs: writing costs"),
    ],
)
def test_probe_says_whether_it_pays(
    tmp_path: Path, times: tuple[float, ...], uses: float | None, kept: int, said: str
) -> None:
    measured = measure(tmp_path, lambda _: torch.ones(8, 4, 5), torch.zeros(8, 3, 2, 2), clock_of(*times))
    assert measured.size == 4 * 5 * 4
    assert said in verdict(measured, uses, kept, 100)
    assert not list(tmp_path.iterdir())


def test_probe_tells_milliseconds_and_bytes_of_an_image() -> None:
    told = verdict(Measured(encode=10 * MS, write=1 * MS, read=2 * MS, size=1200), 3.0, 0, 100)
    assert told.startswith("encode 10 ms/image, read 2 ms/image, 1,200 bytes/image")
    assert told.endswith("about 15 ms/image saved in 3 epochs")


def test_run_prints_one_line_of_the_probe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(write_llava(tmp_path, 4), settings(tmp_path / "run", steps=1, feature_cache_dir=tmp_path / "features"))
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("feature cache:")]
    assert len(lines) == 1
    assert "ms/image" in lines[0]
