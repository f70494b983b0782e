"""Hundreds of steps in which ranks meet with micro-batches of every kind; ranks that are stopped under a real launcher
with the default patience. Run by `make test-long`."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from engines import config_that_shards_all
from hanging import launch_with
from mixed import on_rank, train_mixed, write_mixed
from mllm.train.settings import TrainConfig
from runs import metrics, on_two_ranks

pytestmark = pytest.mark.long
STEPS = {"align": 100, "lora": 60, "full": 40}
"""200 in all."""


@pytest.mark.parametrize("engine", ["zero3", "zero2", "ddp"])
def test_200_adversarial_steps_do_not_hang_and_have_the_losses_of_one_process(engine: str, tmp_path: Path) -> None:
    pytest.importorskip("deepspeed", reason="deepspeed is not installed: pip install 'mllm[deepspeed]'")
    data = write_mixed(tmp_path / "data", 120)
    train_mixed(data, tmp_path / "one", STEPS)
    if engine != "ddp":
        (tmp_path / f"{engine}.json").write_text(config_that_shards_all(engine))
    began = time.monotonic()
    on_two_ranks(on_rank, engine, data, tmp_path, STEPS)
    for what, steps in STEPS.items():
        one, two = (metrics(tmp_path / folder / what, "step", "loss", "skipped") for folder in ("one", engine))
        assert len(one) == steps
        for ours, theirs in zip(one, two, strict=True):
            assert theirs == pytest.approx(ours, rel=2e-3)  # the rounding of 100 steps adds up
        furthest = max(abs(theirs[1] / ours[1] - 1) for ours, theirs in zip(one, two, strict=True))
        print(f"{engine} {what}: {steps} steps, losses apart by at most {furthest:.1e}")
    print(f"{engine}: {sum(STEPS.values())} steps, no hang, {time.monotonic() - began:.0f} s")


@pytest.mark.parametrize("culprit", [1, 0])
def test_stopped_rank_is_named_within_60_seconds_with_the_default_settings(
    culprit: int, hub: Path, tmp_path: Path
) -> None:
    done, took = launch_with("stopped", culprit, hub, tmp_path, hang_stop_seconds=70)
    assert done.returncode != 0
    lines: list[dict[str, Any]] = [
        json.loads(line) for line in (tmp_path / "align" / "hang.jsonl").read_text().splitlines()
    ]
    names = (tmp_path / "stopped").read_text().splitlines()
    for line in (lines[0], lines[-1]):
        [one] = line["waits_for"]
        assert (line["rank"], one["rank"], one["step"]) == (1 - culprit, culprit, 3)
        assert one["sample_ids"] == names
        assert not one["answers"]
    assert lines[-1]["ends"]
    stopped = (tmp_path / "stopped").stat().st_mtime
    told = time.mktime(time.strptime(lines[0]["time"][:19], "%Y-%m-%dT%H:%M:%S"))
    assert TrainConfig(output_dir=tmp_path).hang_seconds < told - stopped + 1 < 60
    assert f"for rank {culprit} (step 3, loading" in done.stderr
    said = next(line for line in done.stderr.splitlines() if line.startswith("hang:"))
    print(f"rank {culprit} stopped: told after {told - stopped:.0f} s, ended after {took:.0f} s\n{said}")
