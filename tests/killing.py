"""Runs that are killed again and again: start, wait for a moment, end every process of it, go on, compare.

Enters: a way to start a run that notes the samples of its micro-batches, and moments. Leaves: counts, and what the run
is to be compared by: its trace of losses, the samples of each step, its weights.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import load_file

from mllm.train import loop
from mllm.train.checkpoint import checkpoints
from mllm.train.saving.durable import MANIFEST, REPLACED, UNFINISHED, damage, read_lines

Ids = dict[int, list[str]]
"""The samples of each step, sorted."""
TOLD = (
    "kills",
    "kills during a save",
    "told to go",
    "resumes",
    "traces compared",
    "steps compared",
    "samples repeated",
    "samples lost",
    "checkpoints spoilt",
    "spoilt checkpoints passed over",
    "half files under a whole name",
)
"""What a campaign counts."""


class Running(Protocol):
    """A process that was started: `subprocess.Popen`, or `Forked`."""

    pid: int

    def poll(self) -> int | None: ...
    def wait(self) -> int: ...


class Forked:
    """A function in a process of its own that needs no start: what it imports is there."""

    def __init__(self, function: Callable[[], object], said: Path) -> None:
        self.code: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            os.setsid()
            screen = os.open(said, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
            os.dup2(screen, 1)
            os.dup2(screen, 2)
            sys.stdout = sys.stderr = os.fdopen(1, "w", buffering=1, closefd=False)
            code = 1
            try:
                function()
                code = 0
            except SystemExit as ended:
                code = int(ended.code or 0)
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                os._exit(code)

    def poll(self) -> int | None:
        if self.code is None and (found := os.waitpid(self.pid, os.WNOHANG))[0]:
            self.code = os.waitstatus_to_exitcode(found[1])
        return self.code

    def wait(self) -> int:
        while (code := self.poll()) is None:
            time.sleep(0.002)
        return code


def note_samples(record: str) -> None:
    """From now on the loop of this process notes the samples of each micro-batch that it takes, before it computes
    with them; `record` is where, with the rank behind it."""
    batches = loop.batches

    def noted(dataset: Any, first_step: int, *more: Any) -> Iterator[Any]:
        # made now, as without notes: a loader draws a random number when it is made
        return note(batches(dataset, first_step, *more), first_step, dataset.accumulation)

    def note(taken: Iterator[Any], first_step: int, accumulation: int) -> Iterator[Any]:
        with open(f"{record}-{os.environ.get('RANK', '0')}.jsonl", "a", buffering=1) as file:
            for number, batch in enumerate(taken):
                ids = [name for row in batch["sample_ids"] for name in row]
                file.write(json.dumps({"step": first_step + number // accumulation + 1, "ids": ids}) + "\n")
                yield batch

    loop.batches = noted  # type: ignore[assignment]


@dataclass
class Campaign:
    """One run, over all its deaths."""

    out: Path
    """Its stage folder; what the run prints stands beside it, in `said`."""
    records: Path
    start: Callable[[str], Running]
    """Starts it, or goes on with it; gets the place for the notes of this attempt."""
    seed: int = 0
    counts: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.draw = random.Random(self.seed)
        self.members: list[int] = []
        """Processes of the present attempt, as far as they are known."""
        self.spoilt: set[str] = set()
        """Checkpoints of which a bit was changed."""
        self.records.mkdir(parents=True)

    def attempt(self) -> Running:
        self.counts["resumes" if self.counts["starts"] else "first starts"] += 1
        self.counts["starts"] += 1
        self.members = []
        return self.start(str(self.records / f"{self.counts['starts']:03}"))

    def killed(self, moment: Callable[[Running], bool]) -> None:
        """Start, and `kill -9` everything at that moment; nothing that looks whole may be half."""
        run = self.attempt()
        assert moment(run), f"the run ended with {run.poll()} before it could be killed"
        kill(run, self.members)
        self.counts["kills"] += 1
        self.counts["kills during a save"] += bool(unfinished(self.out))
        whole = [path for path in checkpoints(self.out) if str(path) not in self.spoilt]
        self.counts["half files under a whole name"] += sum(bool(damage(path)) for path in whole)

    def told_to_go(self, moment: Callable[[Running], bool]) -> int:
        """Start, and send SIGTERM to the launcher at that moment; all that ran has ended when this is left."""
        run = self.attempt()
        assert moment(run), f"the run ended with {run.poll()} before it could be told to go"
        members = family(run.pid)
        os.kill(run.pid, signal.SIGTERM)
        code = run.wait()
        while any(map(alive, members)):
            time.sleep(0.02)
        self.counts["told to go"] += 1
        return code

    def spoil(self) -> None:
        """Change a bit of the newest checkpoint. There must be another one."""
        assert len(checkpoints(self.out)) > 1
        newest = checkpoints(self.out)[-1]
        file = self.draw.choice(sorted(path for path in newest.iterdir() if path.name != MANIFEST))
        spoilt = bytearray(file.read_bytes())
        spoilt[self.draw.randrange(len(spoilt))] ^= 1 << self.draw.randrange(8)
        file.write_bytes(spoilt)
        self.spoilt.add(str(newest))
        self.counts["checkpoints spoilt"] += 1

    def to_the_end(self) -> None:
        assert self.attempt().wait() == 0

    # moments

    def in_a_step(self, run: Running) -> bool:
        """Some time in one of the next steps."""
        return self.steps_on(run, self.draw.randint(1, 4)) and self.later(run, self.draw.uniform(0, 0.05))

    def in_a_save(self, run: Running) -> bool:
        """While the next checkpoint but a few is being written."""
        if not self.steps_on(run, self.draw.randint(1, 3)):
            return False
        self.members = family(run.pid)  # to look for them takes longer than to save
        return until(run, lambda: bool(unfinished(self.out))) and self.later(run, self.draw.uniform(0, 0.01))

    def two_saves_on(self, run: Running) -> bool:
        """In one of the steps after the next two checkpoints, of which there is one every two steps."""
        return self.steps_on(run, 5)

    def at_the_start(self, run: Running) -> bool:
        """While it imports, builds, reads its data or its checkpoint: at the latest with its first samples."""
        before, late = self.newest_change(), time.monotonic() + self.draw.uniform(0.2, 6.0)
        return until(run, lambda: time.monotonic() > late or self.newest_change() != before)

    def at_the_end(self, run: Running) -> bool:
        """While the finished stage is written."""
        return until(run, (self.out / "ledger.json").exists) and self.later(run, self.draw.uniform(0, 0.05))

    def steps_on(self, run: Running, number: int) -> bool:
        """So many lines after the first one that this attempt writes."""
        before = self.newest_change()
        started = until(run, lambda: self.newest_change() != before and bool(lines(self.out)))
        target = lines(self.out) + number
        return started and until(run, lambda: lines(self.out) >= target)

    def newest_change(self) -> int:
        """Of the notes of this attempt: how long they are."""
        return sum(path.stat().st_size for path in self.records.glob(f"{self.counts['starts']:03}-*"))

    @staticmethod
    def later(run: Running, seconds: float) -> bool:
        time.sleep(seconds)
        return run.poll() is None

    def samples(self) -> Ids:
        """Those that the weights have learned from: where a step was taken twice, because its first weights were lost
        with the process, the second time counts."""
        found: dict[int, list[str]] = {}
        for number in range(1, self.counts["starts"] + 1):
            noted = [line for path in sorted(self.records.glob(f"{number:03}-*")) for line in read_lines(path)]
            first = min((line["step"] for line in noted), default=None)
            if first is not None:
                found = {step: ids for step, ids in found.items() if step < first}
            for line in noted:
                found.setdefault(line["step"], []).extend(line["ids"])
        return {step: sorted(ids) for step, ids in found.items()}


def until(run: Running, reached: Callable[[], bool]) -> bool:
    """Wait; False if the run ended first."""
    while not reached():
        if run.poll() is not None:
            return False
        time.sleep(0.001)
    return run.poll() is None


def lines(out: Path) -> int:
    path = out / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def unfinished(out: Path) -> list[Path]:
    """What a save has begun and not ended."""
    try:
        return [path for path in (out / "checkpoints").iterdir() if path.name.startswith((UNFINISHED, REPLACED))]
    except OSError:
        return []


def kill(run: Running, known: Iterable[int] = ()) -> None:
    """`kill -9` of a process and all that it started, also in sessions of their own; those that are known stop at
    once."""
    for pid in known:
        send(pid, signal.SIGSTOP)
    members = family(run.pid)
    for pid in members:
        send(pid, signal.SIGSTOP)  # nobody shall start another, or notice, meanwhile
    for pid in {*members, *family(run.pid)}:
        send(pid, signal.SIGKILL)
    run.wait()
    while any(map(alive, members)):
        time.sleep(0.002)


def send(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):  # it ended meanwhile
        os.kill(pid, number)


def family(pid: int) -> list[int]:
    """A process and its descendants."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
        except (OSError, ValueError):
            continue  # it ended meanwhile
        children.setdefault(parent, []).append(int(stat.parent.name))
    found = [pid]
    for member in found:
        found += children.get(member, [])
    return found


def alive(pid: int) -> bool:
    """Neither gone nor a zombie that waits for its parent to look."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def trace(out: Path) -> list[tuple[int, float, float]]:
    """Step, loss and gradient norm, every bit of them."""
    return [(line["step"], line["loss"], line["grad_norm"]) for line in read_lines(out / "metrics.jsonl")]


def weights(out: Path) -> dict[str, torch.Tensor]:
    """All that a stage and its newest checkpoint hold."""
    files = [*out.glob("*.safetensors"), *out.glob("adapter/*.safetensors")]
    files.append(checkpoints(out)[-1] / "trained.safetensors")
    return {f"{path.name}: {name}": tensor for path in files for name, tensor in load_file(path).items()}


def repeated_and_lost(found: Iterable[list[str]], whole: Iterable[list[str]]) -> tuple[int, int]:
    """Samples that were learned from more often, and less often, than by the run that was never killed."""
    ours, theirs = (Counter(name for ids in steps for name in ids) for steps in (found, whole))
    return (ours - theirs).total(), (theirs - ours).total()


def told(name: str, counts: Counter[str]) -> str:
    """One line of all counts, zeros too."""
    return f"{name}: " + ", ".join(f"{what} {counts[what]}" for what in TOLD)


def assert_passed_over(campaign: Campaign) -> None:
    """Each checkpoint that was spoilt was named when the run resumed, and no other; counted."""
    said = (campaign.out.parent / "said").read_text(errors="replace")
    named = set(re.findall(r"checkpoint (\S+) is passed over", said))
    assert named == campaign.spoilt
    campaign.counts["spoilt checkpoints passed over"] += len(named)


def assert_same_samples(campaign: Campaign, whole: Campaign) -> None:
    """Each step learned from the samples that it has in the run that was never killed; counted."""
    repeated, lost = repeated_and_lost(campaign.samples().values(), whole.samples().values())
    campaign.counts["samples repeated"] += repeated
    campaign.counts["samples lost"] += lost
    campaign.counts["traces compared"] += 1
    campaign.counts["steps compared"] += len(trace(whole.out))
    assert (repeated, lost) == (0, 0)
    assert campaign.samples() == whole.samples()


def assert_same(campaign: Campaign, whole: Campaign) -> None:
    """Bit for bit the run that was never killed, and nothing half or spoilt was taken for whole; counted."""
    assert trace(campaign.out) == trace(whole.out)
    ours, theirs = weights(campaign.out), weights(whole.out)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert_same_samples(campaign, whole)
    assert_passed_over(campaign)
    assert campaign.counts["half files under a whole name"] == 0
