"""How fast is it, beside what people use instead? A subcommand for each subject, all measured here and now.

    python recipes/benchmark.py data --json OUT.json
    python recipes/benchmark.py train --json OUT.json
    python recipes/benchmark.py chat --json OUT.json
    python recipes/benchmark.py peers --json OUT.json
    python recipes/benchmark.py gpu --out DIR --minutes 9
    python recipes/benchmark.py fp8 --json OUT.json

Enters: nothing; the data is drawn. Leaves: a table on the screen and, in `--json`, the numbers with the machine.
"""

from __future__ import annotations

import os

os.environ["TOKENIZERS_PARALLELISM"] = "false"  # libraries read it as they are imported

import json
import subprocess
import sys
import time
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, NoReturn

import tyro
from rich.console import Console
from rich.table import Table

from benchmarks.report import fill_table, machine, rate_table
from benchmarks.resuming import earlier, fingerprint, with_figures
from mllm.quiet import quiet_libraries
from mllm.writable import check_file

CHAT_MINUTES, TINY_CHAT_MINUTES = 1.5, 0.3
"""Of `gpu`: on a GPU, and in a rehearsal."""
START_MINUTES = 0.3
"""Until both processes have imported what they need."""
GOES_ON = "MLLM_BENCHMARK_GOES_ON"
"""Set for a process that takes over: the file with what is known."""


def data(
    json_path: Annotated[Path | None, tyro.conf.arg(name="json")] = None,
    samples: int = 256,
    repeats: int = 11,
    lengths: int = 20_000,
) -> None:
    """The data engine: loader, index and packer beside a plain loop, webdataset and other packers.

    Args:
        json_path: File to write the numbers to.
        samples: Pictures with texts to draw and load.
        repeats: How often each way is timed, in turn with the others.
        lengths: Samples of each mix of lengths that are packed.
    """
    check_place(json_path)
    for name, value in {"samples": samples, "repeats": repeats, "lengths": lengths}.items():
        if value < 1:
            sys.exit(f"--{name} is {value}: give a positive number")
    if not find_spec("webdataset"):
        sys.exit("webdataset, which is measured beside, is missing: pip install webdataset")
    quiet_libraries()
    from benchmarks.data import measure

    console = Console()
    with console.status("starting") as status:
        found = measure(samples, repeats, lengths, status.update)
    finish(console, [rate_table(found), fill_table(found)], found, json_path)


def train(
    json_path: Annotated[Path | None, tyro.conf.arg(name="json")] = None,
    minutes: float = 9.0,
    quick: bool = False,
    only: Annotated[list[str] | None, tyro.conf.arg(metavar="NAME")] = None,
    pairs: int = 25,
    known: Path | None = None,
    resume: bool = False,
    tiny: bool = False,
) -> None:
    """A step of training beside the naive padded way: real tokens a second, MFU, memory, room by room.

    On a GPU: models of real sizes with random weights, on noise; written down after each configuration. On a CPU: a
    small model, of which ratios are told and what can be counted, since its speed says nothing.

    Args:
        json_path: File to write the numbers to.
        minutes: On a GPU, time for all of it; each configuration gets its share of what is left.
        quick: Few steps of each: a first look.
        only: On a GPU, the configurations to measure, by name or its beginning; all where none is named.
        pairs: On a CPU, steps of each way, in turn with the others.
        known: Results of an earlier run: on a GPU, configurations that have no figure there are measured first.
        resume: Keep the figures that the `--json` file holds, if they are of this machine and this code, and measure
            what is missing.
        tiny: Without a GPU, go through the configurations of a GPU all the same, at tiny sizes: a rehearsal.
    """
    check_place(json_path)
    for name, value in {"minutes": minutes, "pairs": pairs}.items():
        if value <= 0:
            sys.exit(f"--{name} is {value}: give a positive number")
    if known and not known.is_file():
        sys.exit(f"--known {known}: there is no such file")
    if resume and not json_path:
        sys.exit("--resume goes on with the file of --json: name it")
    quiet_libraries()
    import torch

    from benchmarks import training_report as report

    has_gpu = torch.cuda.is_available()
    if only and not (has_gpu or tiny):
        sys.exit(f"--only {' '.join(only)} names configurations of a GPU, and there is none: --tiny rehearses them")
    with Console(stderr=True).status("starting") as status:
        if has_gpu or tiny:
            from benchmarks import training

            device = torch.device("cuda" if has_gpu else "cpu")
            try:
                rows = training.chosen(only, earlier_rows(known))
                before = go_on(json_path) or (resumed(json_path, minutes) if resume else None)
                keep = partial(write, json_path)
                found = training.measure(rows, minutes, quick, keep, status.update, device, before)
            except ValueError as error:
                sys.exit(str(error))
            except training.DeviceLost as error:
                begin_anew(json_path, error)
        else:
            from benchmarks import adapting, counted, ratios

            taken = min(pairs, 5) if quick else pairs
            timed = ratios.measure(taken, status.update)
            found = {
                "counters": {**counted.measure(), **adapting.counts()},
                "ratios": {**timed, "peft_over_fast_lora": adapting.ratio(taken, status.update)},
            }
    found["machine"] = machine()
    tables = [report.rate_table, report.room_table] if "rows" in found else [report.count_table, report.ratio_table]
    finish(Console(width=None if sys.stdout.isatty() else 160), [table(found) for table in tables], found, json_path)
    if has_gpu:  # workers that were killed take long to end, and would be waited for
        sys.stdout.flush()
        os._exit(0)


def chat(
    json_path: Annotated[Path | None, tyro.conf.arg(name="json")] = None,
    tokens: int = 128,
    repeats: int = 5,
    only: Annotated[list[str] | None, tyro.conf.arg(metavar="LLM")] = None,
    resume: bool = False,
) -> None:
    """Two turns about a picture: tokens a second, time to the first token, what the second turn need not compute.

    Models of real sizes with random weights on a CUDA device; on a CPU a small one, and the counts are what matters.

    Args:
        json_path: File to write the numbers to, after each way of each size.
        tokens: Of a first answer.
        repeats: How often each way is timed.
        only: LLMs to measure; all where none is named.
        resume: Measure nothing where the `--json` file has all figures, of this machine and this code.
    """
    check_place(json_path)
    if tokens < 5 or repeats < 1:
        sys.exit(f"--tokens is {tokens}, --repeats {repeats}: give at least 5 and 1")
    quiet_libraries()
    from benchmarks import chatting
    from benchmarks.chat_report import chat_table

    try:
        sizes = chatting.sizes(only)
        found = earlier(json_path, machine()) if resume and json_path else None
    except ValueError as error:
        sys.exit(str(error))
    console = Console(width=None if sys.stdout.isatty() else 160)
    if found is None or not chatting.is_complete(found, sizes):
        with Console(stderr=True).status("starting") as status:
            found = chatting.measure(sizes, tokens, repeats, partial(write, json_path), status.update)
    finish(console, [chat_table(found)], found, json_path)


def peers(json_path: Annotated[Path | None, tyro.conf.arg(name="json")] = None, steps: int = 26) -> None:
    """One tiny Llava, the same samples: a bare PyTorch loop, transformers' Trainer and TRL's SFTTrainer beside ours.

    On a CPU, a thread each, in turn step by step. TRL is measured where it is installed.

    Args:
        json_path: File to write the numbers to.
        steps: Optimiser steps that are timed.
    """
    check_place(json_path)
    if steps < 1:
        sys.exit(f"--steps is {steps}: give a positive number")
    quiet_libraries()
    from benchmarks.peers import disagreement, measure
    from benchmarks.peers_report import facts_table, peers_table

    with Console(stderr=True).status("starting") as status:
        found = measure(steps, status.update)
    found["machine"] = machine()
    tables = [peers_table(found), facts_table(found)]
    finish(Console(width=None if sys.stdout.isatty() else 160), tables, found, json_path)
    if wrong := disagreement(found):
        sys.exit(wrong)


def fp8(
    json_path: Annotated[Path | None, tyro.conf.arg(name="json")] = None,
    home: Path = Path("runs/tiny"),
    rows: int = 3,
    steps: int | None = None,
) -> None:
    """What 8-bit floats do to gradient and loss, by what is multiplied with them; a CPU multiplies the same numbers.

    Cosines of two LLMs with Qwen2.5's depth, of the tiny recipe's, and of one like it with more blocks; the loss curve
    of the recipe's first stage. Data and parts of the recipe are made first where they are missing.

    Args:
        json_path: File to write the numbers to.
        home: Folder of the tiny recipe.
        rows: Rows of which each cosine is taken.
        steps: Of the align runs; as the recipe says where it is not given.
    """
    for name, value in {"rows": rows, "steps": steps}.items():
        if value is not None and value < 1:
            sys.exit(f"--{name} is {value}: give a positive number")
    quiet_libraries()
    from benchmarks.fp8 import measure
    from benchmarks.fp8_report import cosine_table, curve_table

    found = measure(home, rows, steps, lambda words: print(words, file=sys.stderr, flush=True))
    found["machine"] = machine()
    tables = [cosine_table(found), curve_table(found)]
    finish(Console(width=None if sys.stdout.isatty() else 160), tables, found, json_path)


def gpu(out: Path, minutes: float = 9.0, known: Path | None = None) -> None:
    """`train` and `chat` one after the other on a GPU: the whole table in one command of at most ten minutes.

    A folder that holds figures of this machine and this code already is gone on with. Without a GPU it is a rehearsal
    at tiny sizes, whose figures say nothing.

    Args:
        out: Folder that gets train.json, chat.json and their tables in tables.md.
        minutes: For both, with what their processes take to start; chat takes about one and a half of them.
        known: Results of an earlier run: configurations that have no figure there are measured first.
    """
    import torch

    has_gpu = torch.cuda.is_available()
    beside = START_MINUTES + (CHAT_MINUTES if has_gpu else TINY_CHAT_MINUTES)
    if minutes <= beside:
        sys.exit(f"--minutes is {minutes}: chat, and starting, take about {beside:.1f} of them")
    own = [sys.executable, __file__]
    train_json, chat_json = out / "train.json", out / "chat.json"
    trained = [*own, "train", "--minutes", f"{minutes - beside:g}", "--json", str(train_json), "--resume"]
    trained += ["--known", str(known)] if known else []
    chatted = [*own, "chat", "--json", str(chat_json), "--resume", "--repeats", "3" if has_gpu else "1"]
    if not has_gpu:
        trained, chatted = [*trained, "--tiny"], [*chatted, "--tokens", "8"]
    # a process each: what the first leaves on the device goes with it
    codes = [subprocess.run(command).returncode for command in (trained, chatted)]
    write_tables(out / "tables.md", [path for path in (train_json, chat_json) if path.is_file()])
    sys.exit(max(codes))


def write_tables(path: Path, results: list[Path]) -> None:
    """As they stand in BENCHMARKS.md."""
    from benchmarks.page import tables

    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(tables(json.loads(result.read_text())) for result in results))


def earlier_rows(known: Path | None) -> dict[str, Any]:
    """Of results that were written before."""
    return json.loads(known.read_text())["rows"] if known else {}  # type: ignore[no-any-return]


def resumed(json_path: Path | None, minutes: float) -> dict[str, Any] | None:
    """What an earlier call has left, and the clock at zero.

    Raises:
        ValueError: it was measured elsewhere, or with other code.
    """
    found = earlier(json_path, machine()) if json_path else None
    if found is None:
        return None
    now = {"began": time.time(), "minutes": minutes, "calls": found.get("calls", 1) + 1}
    return {**found, **now, "rows": with_figures(found["rows"])}


def begin_anew(json_path: Path | None, error: Exception) -> NoReturn:
    """In the place of this process one that goes on with what is missing."""
    if json_path is None:
        sys.exit(f"the device is lost ({error}): with --json another process would go on")
    os.environ[GOES_ON] = str(json_path)
    os.execv(sys.executable, sys.orig_argv)


def go_on(json_path: Path | None) -> dict[str, Any] | None:
    """What the process before this one has found."""
    told = os.environ.get(GOES_ON)
    return json.loads(Path(told).read_text()) if told and told == str(json_path) else None


def check_place(json_path: Path | None) -> None:
    """Minutes of measuring must not end in a file that cannot be written."""
    try:
        if json_path:
            check_file(json_path, "--json")
    except ValueError as error:
        sys.exit(str(error))


def write(json_path: Path | None, found: dict[str, Any]) -> None:
    """What is known so far, with the machine."""
    if json_path:
        json_path.parent.mkdir(parents=True, exist_ok=True)
        told = {**found, "code": fingerprint(), "machine": machine()}
        json_path.write_text(json.dumps(told, indent=2) + "\n")


def finish(console: Console, tables: list[Table], found: dict[str, Any], json_path: Path | None) -> None:
    """Show the numbers and write them down."""
    found["machine"] = machine()
    console.print(*tables)
    console.print("{processor}, {cores} cores, load {load[0]:.1f}".format(**found["machine"]))
    write(json_path, found)


if __name__ == "__main__":
    tyro.extras.subcommand_cli_from_dict(
        {"data": data, "train": train, "gpu": gpu, "chat": chat, "peers": peers, "fp8": fp8},
        description=(__doc__ or "").splitlines()[0],
    )
