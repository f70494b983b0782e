"""Every configuration measured in turn on this machine's accelerator, with what remains of the time.

Enters: the configurations, a budget of minutes, a way to write down. Leaves: one mapping of numbers, written after each
configuration; one that fails (memory, a missing package) says so in its row, and the next goes on.
"""

from __future__ import annotations

import contextlib
import gc
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from itertools import islice, pairwise
from typing import Any

import numpy as np
import torch

from benchmarks import carried, naive, product
from benchmarks.configurations import Configuration, attention, configurations
from benchmarks.drawn_training import DrawnIndex, draw
from benchmarks.planning import NO_TIME, Rows, Schedule, arranged, paid
from benchmarks.sizes import draw_model
from benchmarks.stopwatch import Budget, Stopwatch
from mllm.models.multimodal import MultimodalLM
from mllm.train.forecasting.flops import Cost, Work, cost_of
from mllm.train.forecasting.peaks import peak_flops
from mllm.train.trainable import choose_trainable

TOKENS = 16_384
"""Of a micro-batch."""
TINY_TOKENS = 512
GEMM = 8192
"""Side of the matrices by which the ceiling is measured."""
Say = Callable[[str], None]


class DeviceLost(Exception):
    """After an illegal access a device does nothing more for this process."""


def measure(
    rows: Sequence[Configuration],
    minutes: float,
    quick: bool,
    write: Callable[[dict[str, Any]], None],
    say: Say,
    device: torch.device | None = None,
    known: dict[str, Any] | None = None,
    clock: Callable[[], float] = time.time,
) -> dict[str, Any]:
    """All rows but those `known` from an earlier process; `write` is handed what is known after each. A CPU gets tiny
    ones.

    Raises:
        DeviceLost: another process must go on.
    """
    device = device or torch.device("cuda")
    if device.type == "cpu":
        rows = [tiny(row) for row in rows]
    say("the ceiling of matrix products")
    found = known or {"began": clock(), "minutes": minutes, "quick": quick, **limits(device), "rows": {}}
    found["rehearsal"] = device.type == "cpu"
    rows = [row for row in rows if row.name not in found["rows"]]
    schedule = Schedule(rows, paid(), quick)
    for row in rows:
        start = clock()
        budget = schedule.next(row, minutes * 60 - (start - found["began"]))
        numbers = attempt(row, budget, device, say) if budget else {"error": f"{NO_TIME} of --minutes {minutes:g}"}
        found["rows"][row.name] = {**asdict(row), **numbers, "wall_seconds": clock() - start}
        found["rows"] = dict(sorted(found["rows"].items(), key=place))
        write(found)
        with contextlib.suppress(RuntimeError):  # of a device that is lost
            forget(device)
        if "error" in numbers and not works(device):
            raise DeviceLost(numbers["error"])
    return found


def place(named: tuple[str, Any]) -> int:
    """Of a row in the table, whenever it was measured."""
    return [row.name for row in configurations()].index(named[0])


def limits(device: torch.device) -> dict[str, float]:
    """Operations a second that a product of large matrices comes to, and those of the data sheet."""
    return {"ceiling": ceiling(device), "peak": peak_flops(device, torch.bfloat16)}


def works(device: torch.device) -> bool:
    """Does the device still answer?"""
    try:
        return bool(torch.ones(1, device=device).item())
    except RuntimeError:
        return False


def chosen(only: Sequence[str] | None, figures: Rows | None = None) -> list[Configuration]:
    """Those whose names begin so, all where none is named; those first that have no figure among these.

    Raises:
        ValueError: there is none.
    """
    known = arranged(configurations(), figures or {})
    rows = [row for row in known if only is None or row.name.startswith(tuple(only))]
    if not rows:
        raise ValueError(f"no configuration begins with {only}: there are {', '.join(row.name for row in known)}")
    return rows


def tiny(row: Configuration) -> Configuration:
    """What a CPU can do of it."""
    return replace(row, llm="tiny", encoder="tiny", attention="sdpa", compiled=False, fp8=False)


def attempt(row: Configuration, budget: Budget, device: torch.device, say: Say) -> dict[str, Any]:
    """The numbers of one configuration, or why there are none. The naive way is given half the batch where memory
    runs out, and a micro-batch with adapters half its tokens, twice at most."""
    least = 1 if row.way == "naive" else naive.BATCH // 4 if row.lora else naive.BATCH
    batch = naive.BATCH
    while True:
        try:
            return one(row, budget, device, say, batch)
        except torch.OutOfMemoryError:
            why = "out of memory"
        except Exception as error:  # whatever it is, the other rows are worth having
            why = f"{type(error).__name__}: {error}"
            why = "out of memory" if "out of memory" in why else why[:300]
        if why != "out of memory" or batch <= least:
            return {"error": why}
        batch //= 2
        forget(device)


def one(row: Configuration, budget: Budget, device: torch.device, say: Say, batch: int) -> dict[str, Any]:
    """Build, train, look at the watch."""
    say(f"{row.name}: building")
    watch = Stopwatch(budget, device, lambda words: say(f"{row.name}: {words}"))
    model = draw_model(row.llm, row.encoder, device, dtype_on(device), attention(row))
    watch.lap("drawing the model")
    choose_trainable(model, row.rates, row.adapter)
    watch.rooms, cost = rooms(model), cost_of(model)
    watch.lap("choosing what trains")
    index, processor = draw(carried.drawing_of(row.kind, row.encoder, row.llm))
    watch.lap("drawing the data")
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    run = naive_run if row.way == "naive" else product_run
    shape, numbers = run(row, model, index, processor, watch, device, batch)
    watch.lap("ending")
    timed = numbers(watch.warmed_up, len(watch.step_seconds()))
    works, positions = [work_of(index, step) for step in timed], [positions_of(shape, index, step) for step in timed]
    rates = told(watch, works, cost, peak_flops(device, torch.bfloat16))
    return {**shape, **rates, **on_the_mix(shape["fill"], rates["each"], positions), "peak_memory": peak_memory(device)}


def naive_run(
    row: Configuration,
    model: MultimodalLM,
    index: DrawnIndex,
    processor: Any,
    watch: Stopwatch,
    device: torch.device,
    batch: int,
) -> tuple[dict[str, Any], Callable[[int, int], list[Any]]]:
    """Its shape, and the samples of its steps."""
    if row.checkpointing:
        model.llm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    llava = naive.NaiveLlava(model)
    llava.train()
    normalisation = model.vision_encoder.normalisation
    assert normalisation is not None
    samples = naive.Samples(index, processor, normalisation)
    watch.look_at(llava)
    order = naive.spread(index.length.tolist(), batch)
    batches = watch.loads(naive.read(samples, batch, workers(device), order))
    with watch.running():
        exhaust(naive.loop(llava, batches, device, 1e-3, bf16=device.type == "cuda"))

    def numbers(first: int, steps: int) -> list[Any]:
        return list(islice(naive.spread(index.length.tolist(), batch), first, first + steps))

    return {"batch": batch, "fill": carried.padded_fill(index, batch)}, numbers


def product_run(
    row: Configuration,
    model: MultimodalLM,
    index: DrawnIndex,
    processor: Any,
    watch: Stopwatch,
    device: torch.device,
    batch: int,
) -> tuple[dict[str, Any], Callable[[int, int], list[Any]]]:
    """Its shape, and the samples of its steps."""
    part = batch / naive.BATCH
    length, number = product.layout(index.length, int(part * (TOKENS if device.type == "cuda" else TINY_TOKENS)))
    with product.scratch() as folder:
        train = product.settings(row, folder, number, bf16=device.type == "cuda")
        data = product.data_settings(length, workers(device))
        plan = product.plan_of(index, data, train)
        shape = {"seq_length": length, "rows": number, "part": part, "accumulation": row.accumulation}
        shape |= {"fill": plan.fill()}
        objective = product.AllLogits if row.full_logits else product.NextToken
        with watch.running(), contextlib.nullcontext() if row.fast_lora else product.adapters_by_peft():
            if row.way == "bare":
                held = product.held(model, index, processor, plan, data, train, device)
                watch.look_at(own := objective(model))
                exhaust(product.bare(model, held, train, own))
            product.loop(model, index, processor, data, train, device, watch, objective)
    steps = product.HELD if row.way == "bare" else product.STEPS

    def numbers(first: int, count: int) -> list[Any]:
        return [np.concatenate(plan.rows(step % steps)) for step in range(first, first + count)]

    return shape, numbers


def dtype_on(device: torch.device) -> torch.dtype:
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def exhaust(steps: Iterator[None]) -> None:
    """Take steps until somebody ends them."""
    for _ in steps:
        pass


def rooms(model: MultimodalLM) -> dict[str, Any]:
    return {"encoder": model.vision_encoder, "connector": model.connector, "LLM": model.llm.get_decoder()}


def workers(device: torch.device) -> int:
    """Processes that read."""
    return 4 if device.type == "cuda" else 0


def work_of(index: DrawnIndex, samples: Any) -> Work:
    """What must be computed for these samples, however they are laid out."""
    length = index.length[samples].astype(np.int64)
    pairs = int((length * (length + 1) // 2).sum())
    return Work(int(length.sum()), pairs, int(index.supervised[samples].sum()), int(index.images[samples].sum()))


def positions_of(shape: dict[str, Any], index: DrawnIndex, samples: Any) -> int:
    """Of a step, padding among them."""
    if "batch" in shape:
        return carried.padded_positions(index, [samples])
    return int(shape["rows"] * shape["accumulation"] * shape["seq_length"])


def on_the_mix(fill: float, each: dict[str, list[float]], positions: list[int]) -> dict[str, Any]:
    """The rate carried to all samples, and what it is made of."""
    return {
        "tokens_per_second_mix": carried.tokens_per_second(fill, sum(positions), sum(each["seconds"])),
        "timed_fill": sum(each["tokens"]) / sum(positions),
        "each": {**each, "positions": positions},
    }


def told(watch: Stopwatch, works: Sequence[Work], cost: Cost, peak: float) -> dict[str, Any]:
    """The numbers of a row: medians of steps, with the 10th and 90th percentile of the rate, and each step."""
    seconds = watch.step_seconds()
    rates = [work.tokens / spent for work, spent in zip(works, seconds, strict=True)]
    flops = [cost.flops(work) / spent for work, spent in zip(works, seconds, strict=True)]
    low, high = np.percentile(rates, [10, 90]).tolist()
    return {
        "tokens_per_second": statistics.median(rates),
        "tokens_per_second_p10": low,
        "tokens_per_second_p90": high,
        "tokens_per_second_mean": sum(work.tokens for work in works) / sum(seconds),
        "images_per_second": sum(work.images for work in works) / sum(seconds),
        "flops_per_second": statistics.median(flops),
        "flops_per_token": sum(map(cost.flops, works)) / sum(work.tokens for work in works),
        "mfu": statistics.median(flops) / peak,
        "step_seconds": statistics.median(seconds),
        "tokens_per_step": statistics.fmean(work.tokens for work in works),
        "steps": len(seconds),
        "warm_up": watch.warmed_up,
        "rooms": watch.room_seconds(),
        "laps": watch.laps,
        "syncs_per_step": len(watch.syncs) / watch.budget.rooms,
        "sync_places": sorted(set(watch.syncs)),
        "recompiled": watch.recompiled,
        "each": {"seconds": seconds, "tokens": [work.tokens for work in works]},
    }


def ceiling(device: torch.device) -> float:
    """Operations a second of a large product of random matrices: the most that is to be had."""
    side, times = (GEMM, 30) if device.type == "cuda" else (1024, 5)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    left, right = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    watch = Stopwatch(Budget(), device)
    out = left @ right
    for _ in range(times):
        torch.mm(left, right, out=out)
    moments = [watch.moment()]
    for _ in range(times):
        torch.mm(left, right, out=out)
        moments.append(watch.moment())
    watch.wait()
    spent = [watch.seconds(start, end) for start, end in pairwise(moments)]
    return 2 * side**3 / statistics.median(spent)


def peak_memory(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated() if device.type == "cuda" else 0


def forget(device: torch.device) -> None:
    """Give back what a row has left behind."""
    torch._dynamo.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.set_sync_debug_mode("default")
        torch.cuda.empty_cache()
