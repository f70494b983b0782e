"""More than one launcher: two machines are two launchers on the loopback, each with a rank of its own on the CPU."""

from __future__ import annotations

import json
import os
import re
import runpy
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from conftest import forget_accelerate, write_llava
from killing import Forked
from mllm.train import engine

ROOT = Path(__file__).parent.parent
SLURM = ROOT / "recipes" / "launch" / "slurm.sh"
ACCELERATE = [sys.executable, "-m", "accelerate.commands.launch"]
SRUN = """#!/bin/bash
# as SLURM does it: the command on each of two machines, signals handed on, the highest exit code
while [[ $1 == --* ]]; do shift; done
for machine in 0 1; do SLURM_NODEID=$machine "$@" & tasks+=($!); done
trap 'kill -USR1 "${tasks[@]}"' USR1
trap 'kill -TERM "${tasks[@]}"' TERM
highest=0
for task in "${tasks[@]}"; do
    while :; do wait "$task"; code=$?; kill -0 "$task" 2>/dev/null || break; done
    ((code > highest)) && highest=$code
done
exit "$highest"
"""
SCONTROL = """#!/bin/bash
[ "$1" = show ] && echo 127.0.0.1
[ "$1" = requeue ] && echo "$2" >> "$REQUEUED"
exit 0
"""
LAUNCHER = """#!/bin/bash
# as torchrun does it: SIGUSR1 is not handled, SIGTERM goes on to the process, and one that fails is a failure
while [[ $1 != *.py ]]; do shift; done
python "$PROCESS" "$@" & process=$!
trap 'kill -TERM "$process"' TERM
while :; do wait "$process"; code=$?; kill -0 "$process" 2>/dev/null || break; done
exit $((code > 0))
"""
PROCESS = """
import os, signal, sys, time
time.sleep(1)  # imports, while which it listens to nothing
def leave(*told):
    open(os.environ['SAVED'], 'a').write('saved ')
    sys.exit(143)
for number in (signal.SIGTERM, signal.SIGUSR1):
    signal.signal(number, leave)
open(os.environ['TRAINS'], 'a').close()
time.sleep(60)
"""

pytestmark = pytest.mark.recipe


@pytest.fixture
def config(hub: Path, tmp_path: Path) -> Path:
    """A run of four steps, each of four rows."""
    return write_config(tmp_path, hub, write_llava(tmp_path, 8))


def write_config(folder: Path, hub: Path, data: Path, **train: Any) -> Path:
    written = {
        "model": {"vision_encoder": str(hub / "encoder"), "llm": str(hub / "llm")},
        "data": {"sources": [{"path": str(data)}], "seq_length": 96, "num_workers": 0},
        "train": {
            "output_dir": str(folder / "several"),
            "learning_rate": {"connector": 1e-2},
            "steps": 4,
            "rows_per_step": 4,
            "audit": "off",
            **train,
        },
    }
    (folder / "align.yaml").write_text(yaml.safe_dump(written))
    return folder / "align.yaml"


def environment(**more: str) -> dict[str, str]:
    """Of a shell in which nothing of a launcher is set."""
    strange = ("ACCELERATE_", "FSDP_", "MASTER_", "RANK", "WORLD_SIZE", "LOCAL_", "MLLM_FSDP2")
    own = {name: value for name, value in os.environ.items() if not name.startswith(strange)}
    return {**own, "OMP_NUM_THREADS": "1", "COLUMNS": "200", **more}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def in_one_process(config: Path, *arguments: str) -> list[float]:
    """The losses of the same run without a launcher, in a forked process: what it imports is there."""
    one = config.parent / "one"

    def begin() -> None:
        own = environment(ACCELERATE_USE_CPU="true")
        os.environ.clear()
        os.environ.update(own)
        forget_accelerate()
        script = str(ROOT / "recipes" / "pretrain.py")
        sys.argv = [script, "--config", str(config), "--train.output_dir", str(one), *arguments]
        runpy.run_path(script, run_name="__main__")

    run = Forked(begin, config.parent / "said-by-one.txt")
    assert run.wait() == 0, (config.parent / "said-by-one.txt").read_text()[-3000:]
    return losses(one)


def slurm(folder: Path, engine_config: str) -> dict[str, str]:
    """What SLURM sets in a job of two machines with one device each, and its two commands."""
    (folder / "bin").mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (folder / "bin" / name).write_text(text)
        (folder / "bin" / name).chmod(0o755)
    return environment(
        PATH=f"{folder / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        PYTHONPATH=f"{ROOT}:{os.environ.get('PYTHONPATH', '')}",
        ENGINE=f"deepspeed_configs/{engine_config}.yaml",
        SLURM_JOB_ID=str(free_port() - 20000),
        SLURM_JOB_NODELIST="machine[1-2]",
        SLURM_NNODES="2",
        SLURM_GPUS_ON_NODE="1",
        HF_HOME=str(folder / "huggingface"),
        MLLM_CACHE=str(folder / "cache"),
        REQUEUED=str(folder / "requeued"),
    )


def test_slurm_script_trains_on_two_machines_as_one_process_does(config: Path, tmp_path: Path) -> None:
    command = ["bash", str(SLURM), "recipes/pretrain.py", "--config", str(config)]
    environment_ = slurm(tmp_path, "accelerate_cpu_fsdp2")
    done = subprocess.run(command, cwd=ROOT, env=environment_, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("ranks: 2, on cpu, FSDP2") == 1  # the first rank alone speaks
    assert "the LLM is read one weight at a time into the shards" in done.stdout
    assert not (tmp_path / "requeued").exists()
    assert losses(tmp_path / "several") == pytest.approx(in_one_process(config), rel=1e-5)


def test_slurm_script_is_bash_and_asks_for_what_its_comments_say() -> None:
    subprocess.run(["bash", "-n", str(SLURM)], check=True)
    asked = dict(re.findall(r"^#SBATCH --([a-z-]+)=(\S+)", SLURM.read_text(), re.MULTILINE))
    assert asked["ntasks-per-node"] == "1"  # the launcher starts the others
    assert asked["signal"] == "USR1@120"
    assert asked["open-mode"] == "append"
    assert "#SBATCH --requeue" in SLURM.read_text()


@pytest.mark.parametrize("moment", ["while it imports", "while it trains"])
@pytest.mark.parametrize(("number", "hears"), [("USR1", "task"), ("USR1", "all"), ("TERM", "task")])
def test_warned_slurm_job_lets_its_processes_save_and_queues_itself_again(
    tmp_path: Path, number: str, hears: str, moment: str
) -> None:
    """With a launcher and a process that do nothing else. SLURM signals the task alone, or all that it started."""
    environment_ = slurm(tmp_path, "accelerate_cpu_fsdp2")
    (tmp_path / "bin" / "accelerate").write_text(LAUNCHER)
    (tmp_path / "bin" / "accelerate").chmod(0o755)
    (tmp_path / "process.py").write_text(PROCESS)
    files = {"PROCESS": tmp_path / "process.py", "SAVED": tmp_path / "saved", "TRAINS": tmp_path / "trains"}
    environment_.update({name: str(path) for name, path in files.items()})
    job = subprocess.Popen(["bash", str(SLURM), "recipes/pretrain.py"], cwd=ROOT, env=environment_, text=True)
    wait_for(lambda: len(running(job.pid)) >= 8 and (moment == "while it imports" or files["TRAINS"].exists()), job)
    (srun,) = children(job.pid)
    told = running(srun)[1:] if hears == "all" else children(srun)
    for process in told:
        os.kill(process, getattr(signal, f"SIG{number}"))
    assert job.wait(timeout=60) == 143
    assert files["SAVED"].read_text().split() == ["saved", "saved"]
    assert (tmp_path / "requeued").read_text().split() == [environment_["SLURM_JOB_ID"]]


@pytest.mark.parametrize("path", sorted((ROOT / "recipes" / "launch").glob("*.yaml")), ids=lambda path: path.stem)
def test_recipe_of_two_machines_starts_each_machines_own_processes(path: Path) -> None:
    recipe = yaml.safe_load(path.read_text())
    assert (recipe["num_machines"], recipe["num_processes"] % 2) == (2, 0)
    assert recipe["deepspeed_config"]["deepspeed_multinode_launcher"] == "standard"
    assert (ROOT / recipe["deepspeed_config"]["deepspeed_config_file"]).is_file()


def test_several_processes_that_became_one_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")  # as accelerate launch does
    engine.check_launcher()
    monkeypatch.setenv("MASTER_PORT", "29500")  # and for more than one process
    with pytest.raises(ValueError, match=r"asked for several processes and started one"):
        engine.check_launcher()
    monkeypatch.setenv("RANK", "0")
    engine.check_launcher()


@pytest.mark.long
def test_accelerate_says_nothing_of_the_processes_it_did_not_start_and_we_do(config: Path) -> None:
    command = [*ACCELERATE, "--cpu", "--num_processes", "2", "recipes/pretrain.py", "--config", str(config)]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=280)
    assert "error: accelerate launch was asked for several processes and started one" in done.stderr
    assert done.returncode != 0


@pytest.mark.long
@pytest.mark.parametrize("stage", ["zero2", "zero3"])
def test_recipe_of_two_machines_trains_on_two_launchers_as_one_process_does(
    config: Path, tmp_path: Path, stage: str
) -> None:
    pytest.importorskip("deepspeed", reason="deepspeed is not installed: pip install 'mllm[deepspeed]'")
    recipe = yaml.safe_load((ROOT / "recipes" / "launch" / f"accelerate_two_machines_{stage}.yaml").read_text())
    recipe.update(use_cpu=True, num_processes=2, main_process_ip="127.0.0.1", main_process_port=free_port())
    (tmp_path / "launch.yaml").write_text(yaml.safe_dump(recipe))
    command = [*ACCELERATE, "--config_file", str(tmp_path / "launch.yaml")]
    machines = [
        subprocess.Popen(
            [*command, "--machine_rank", str(rank), "recipes/pretrain.py", "--config", str(config)],
            cwd=ROOT,
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in (0, 1)
    ]
    said = [machine.communicate(timeout=280)[0] for machine in machines]
    assert [machine.returncode for machine in machines] == [0, 0], said[0][-2000:] + said[1][-2000:]
    assert f"ranks: 2, on cpu, DeepSpeed ZeRO stage {stage[-1]}" in said[0]
    assert "ranks:" not in said[1]
    assert losses(tmp_path / "several") == pytest.approx(in_one_process(config), rel=1e-5)


@pytest.mark.long
@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_warned_slurm_job_writes_a_checkpoint_queues_itself_again_and_goes_on(
    hub: Path, tmp_path: Path, number: signal.Signals
) -> None:
    config = write_config(tmp_path, hub, write_llava(tmp_path, 8), steps=60, save_every=1000)
    command = ["bash", str(SLURM), "recipes/pretrain.py", "--config", str(config)]
    environment_ = slurm(tmp_path, "accelerate_cpu_fsdp2")
    job = subprocess.Popen(
        command, cwd=ROOT, env=environment_, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    wait_for(lambda: (tmp_path / "several" / "metrics.jsonl").exists(), job)
    for srun in children(job.pid):
        os.kill(srun, number)
    said, _ = job.communicate(timeout=280)
    assert job.returncode == 143, said[-3000:]
    assert (tmp_path / "requeued").read_text().split() == [environment_["SLURM_JOB_ID"]]
    assert 0 < len(losses(tmp_path / "several")) < 60
    again = subprocess.run(command, cwd=ROOT, env=environment_, capture_output=True, text=True, timeout=280)
    assert again.returncode == 0, again.stderr[-3000:]
    assert losses(tmp_path / "several") == pytest.approx(in_one_process(config), rel=1e-4)


@pytest.mark.long
def test_run_that_lost_a_rank_goes_on_with_one(hub: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path, hub, write_llava(tmp_path, 8), steps=40, save_every=1)
    several = [*ACCELERATE, "--config_file", "deepspeed_configs/accelerate_cpu_fsdp2.yaml"]
    arguments = ["recipes/pretrain.py", "--config", str(config)]
    job = subprocess.Popen(
        [*several, "--main_process_port", str(free_port()), *arguments],
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    wait_for(lambda: (tmp_path / "several" / "checkpoints" / "step-3").exists(), job)
    os.kill(children(job.pid)[1], signal.SIGKILL)
    said, _ = job.communicate(timeout=280)
    assert job.returncode != 0
    assert len(losses(tmp_path / "several")) < 40, said[-3000:]
    alone = [*ACCELERATE, "--cpu", "--num_processes", "1", *arguments, "--resume"]
    done = subprocess.run(alone, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    assert losses(tmp_path / "several") == pytest.approx(in_one_process(config), rel=1e-4)


def wait_for(happened: Any, job: subprocess.Popen[str]) -> None:
    end = time.monotonic() + 240
    while not happened():
        assert job.poll() is None, job.communicate()[0][-3000:]
        assert time.monotonic() < end, "too slow"
        time.sleep(0.05)


def running(process: int) -> list[int]:
    """A process and all below it."""
    return [process, *(below for child in children(process) for below in running(child))]


def children(process: int) -> list[int]:
    """Of a process, the oldest first."""
    listed = subprocess.run(["pgrep", "--parent", str(process)], capture_output=True, text=True, check=False)
    return sorted(map(int, listed.stdout.split()))
