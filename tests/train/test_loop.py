"""Settings of the loop that change how a run is computed, not what comes out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from mllm.train.trainable import LearningRates
from runs import metrics, run, settings


def test_a_run_with_kept_features_has_the_losses_of_one_without(
    llava_folder: Callable[..., Path], tmp_path: Path
) -> None:
    data = llava_folder(8)
    run(data, settings(tmp_path / "live", steps=6))
    run(data, settings(tmp_path / "kept", steps=6, feature_cache=1.0))
    live, kept = (metrics(tmp_path / name, "loss", "grad_norm") for name in ("live", "kept"))
    assert [number for line in kept for number in line] == pytest.approx([n for line in live for n in line], rel=1e-5)


def test_features_of_an_encoder_that_trains_are_not_kept(llava_folder: Callable[..., Path], tmp_path: Path) -> None:
    rates = LearningRates(connector=1e-2, vision_encoder=1e-3)
    with pytest.raises(ValueError, match="frozen encoder"):
        run(llava_folder(4), settings(tmp_path, learning_rate=rates, feature_cache=1.0))


def test_a_run_counts_samples_alike_where_its_settings_say_so(
    llava_folder: Callable[..., Path], tmp_path: Path
) -> None:
    data = llava_folder(8)
    for reduction in ("token", "sample"):
        run(data, settings(tmp_path / reduction, steps=1, loss_reduction=reduction))
    (tokens,), (samples,) = (metrics(tmp_path / name, "loss", "supervised_tokens") for name in ("token", "sample"))
    assert tokens[0] != samples[0]
    assert tokens[1] == samples[1]
