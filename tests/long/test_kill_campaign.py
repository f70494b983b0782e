"""The campaign: the real launcher, killed and told to go at random moments, on one rank and on two, until it is done.

Each run is compared to one that was never killed: losses and gradient norms of all steps and all final weights bit for
bit, and the samples that each step learned from. `make test-long` prints the counts.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from conftest import write_llava
from killing import Campaign, Running, assert_same, assert_same_samples, lines, told, trace
from mllm.train.checkpoint import checkpoints

ROOT = Path(__file__).parents[2]
ACCELERATE = [sys.executable, "-m", "accelerate.commands.launch"]
LAUNCHERS = {
    "one process": [*ACCELERATE, "--num_processes", "1", "--cpu"],
    "two ranks": [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"],
    "ZeRO-2": [*ACCELERATE, "--config_file", "deepspeed_configs/accelerate_cpu_zero2.yaml"],
}
TOTAL: Counter[str] = Counter()

pytestmark = [pytest.mark.long, pytest.mark.recipe]


@pytest.fixture(scope="module", autouse=True)
def sums() -> Iterator[None]:
    """The sums of all campaigns, at the end."""
    yield
    print("\n" + told("kill campaign, in all", TOTAL))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llava(tmp_path_factory.mktemp("data"), records=60)


class Stage:
    """A campaign on `recipes/pretrain.py`: connector and LoRA, two workers, checkpoints often; the launcher may change
    from start to start."""

    def __init__(self, folder: Path, hub: Path, data: Path, launcher: str, seed: int = 0, **train: Any) -> None:
        folder.mkdir(parents=True)
        self.config, self.launcher, self.said = folder / "config.yaml", launcher, folder / "said"
        settings = {
            "output_dir": str(folder / "out"),
            "learning_rate": {"connector": 1e-2, "llm": 1e-2},
            "lora": {"rank": 4, "alpha": 8, "dropout": 0.1},
            "rows_per_step": 4,
            "save_every": 2,
            **train,
        }
        parts = {"vision_encoder": str(hub / "encoder"), "llm": str(hub / "llm")}
        sources = [{"format": "llava", "path": str(data)}]
        read = {"sources": sources, "seq_length": 96, "num_workers": 2, "index_dir": str(folder / "index")}
        self.config.write_text(yaml.safe_dump({"model": parts, "data": read, "train": settings}))
        self.campaign = Campaign(folder / "out", folder / "records", self.start, seed)

    def start(self, record: str) -> Running:
        script = ["tests/long/recorded.py", record, "recipes/pretrain.py", "--config", str(self.config), "--resume"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
        if self.launcher != "ZeRO-2":
            environment["ACCELERATE_USE_CPU"] = "true"
        with self.said.open("a") as said:
            command = [*LAUNCHERS[self.launcher], *script]
            return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=said, stderr=said)


def report(name: str, campaign: Campaign) -> None:
    TOTAL.update(campaign.counts)
    print("\n" + told(name, campaign.counts))


@pytest.fixture(scope="module")
def never_killed(hub: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Campaign]:
    """The reference of a launcher and settings, run once."""
    done: dict[str, Campaign] = {}

    def reference(launcher: str, **train: Any) -> Campaign:
        key = f"{launcher} {train}"
        if key not in done:
            done[key] = Stage(tmp_path_factory.mktemp("whole") / "run", hub, data, launcher, **train).campaign
            done[key].to_the_end()
        return done[key]

    return reference


def test_twenty_kills_of_one_process(hub: Path, data: Path, tmp_path: Path, never_killed: Any) -> None:
    campaign = Stage(tmp_path / "run", hub, data, "one process", seed=1, steps=130).campaign
    moments = [*[campaign.in_a_save] * 9, *[campaign.in_a_step] * 5, *[campaign.at_the_start] * 3]
    campaign.draw.shuffle(moments)
    for moment in [*moments[:6], campaign.two_saves_on, *moments[6:], campaign.two_saves_on, campaign.at_the_end]:
        campaign.killed(moment)
        if moment == campaign.two_saves_on:
            campaign.spoil()
    campaign.to_the_end()
    assert_same(campaign, never_killed("one process", steps=130))
    report("one process", campaign)
    assert campaign.counts["kills"] == campaign.counts["resumes"] == 20
    assert campaign.counts["kills during a save"] >= 5


@pytest.mark.parametrize(("launcher", "kills"), [("two ranks", 5), ("ZeRO-2", 3)])
def test_kills_of_two_ranks(
    hub: Path, data: Path, tmp_path: Path, never_killed: Any, launcher: str, kills: int
) -> None:
    if launcher == "ZeRO-2":
        pytest.importorskip("deepspeed", reason="deepspeed is not installed: pip install 'mllm[deepspeed]'")
    campaign = Stage(tmp_path / "run", hub, data, launcher, seed=2, steps=40).campaign
    for number in range(kills - 1):
        campaign.killed(campaign.in_a_step if number % 2 else campaign.in_a_save)
    campaign.killed(campaign.two_saves_on)
    campaign.spoil()
    campaign.to_the_end()
    assert_same(campaign, never_killed(launcher, steps=40))
    report(launcher, campaign)
    assert campaign.counts["kills"] == kills
    assert campaign.counts["kills during a save"] >= 1


@pytest.mark.parametrize("launcher", ["one process", "two ranks"])
def test_launcher_that_is_told_to_go_leaves_a_checkpoint_of_its_last_step(
    hub: Path, data: Path, tmp_path: Path, never_killed: Any, launcher: str
) -> None:
    steps = {"one process": 130, "two ranks": 40}[launcher]
    campaign = Stage(tmp_path / "run", hub, data, launcher, seed=3, steps=steps, save_every=None).campaign
    for _ in range(4):
        assert campaign.told_to_go(campaign.in_a_step) != 0
        assert checkpoints(campaign.out)[-1].name == f"step-{lines(campaign.out)}"
    campaign.to_the_end()
    whole = never_killed(launcher, steps=steps)
    assert trace(campaign.out) == trace(whole.out)
    assert_same_samples(campaign, whole)
    report(f"SIGTERM, {launcher}", campaign)


def test_two_ranks_then_one_then_two_take_the_same_steps(
    hub: Path, data: Path, tmp_path: Path, never_killed: Any
) -> None:
    lora = {"rank": 4, "alpha": 8}  # dropout is drawn by each rank for itself
    whole = never_killed("two ranks", steps=40, lora=lora)
    stage = Stage(tmp_path / "run", hub, data, "two ranks", seed=4, steps=40, lora=lora)
    campaign = stage.campaign
    campaign.killed(campaign.in_a_step)
    by_two = lines(campaign.out)
    stage.launcher = "one process"
    campaign.killed(campaign.two_saves_on)
    assert lines(campaign.out) > by_two
    stage.launcher = "two ranks"
    campaign.killed(campaign.in_a_save)
    campaign.to_the_end()
    ours, theirs = trace(campaign.out), trace(whole.out)
    same = checkpoint_before(by_two)
    assert ours[:same] == theirs[:same]
    for our, their in zip(ours, theirs, strict=True):
        assert our == pytest.approx(their, rel=1e-5)
    assert_same_samples(campaign, whole)
    report("2 ranks, 1, 2", campaign)


def checkpoint_before(step: int) -> int:
    """The step from which the run went on at the earliest."""
    return max(0, step - step % 2 - 2)
