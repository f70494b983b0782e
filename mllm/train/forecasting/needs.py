"""A forecast in words: what a run needs, and a warning with the way out where there is not so much.

Enters: a `Forecast`. Leaves: tables and lines on the console.
"""

from __future__ import annotations

from datetime import timedelta

from rich.console import Console
from rich.table import Table
from rich.text import Text

from mllm.train.forecasting.forecast import Forecast

STOPS = (
    "ends the run: computing in halves is off under ZeRO and FSDP2, which exchange weights or gradients inside of the "
    "passes"
)


def tell(console: Console, forecast: Forecast, whole: bool = False) -> None:
    """A table of a few lines; `whole` adds what the memory is for."""
    table = Table("", "", show_header=False, title="what it needs", title_justify="left")
    for row in rows(forecast):
        table.add_row(*row)
    console.print(table)
    if whole and forecast.memory:
        console.print(memory_table(forecast))
    for words in warnings(forecast):
        console.print(Text.assemble(("warning: ", "bold yellow"), words))
    if forecast.levers:
        console.print(lever_table(forecast))


def rows(forecast: Forecast) -> list[tuple[str, str]]:
    shape, disk, memory = forecast.shape, forecast.disk, forecast.memory
    told = [
        (
            "largest micro-batch",
            f"{shape.rows} rows of {shape.length} tokens, {shape.images} images, {shape.supervised} supervised tokens",
        )
    ]
    if memory:
        predicted = f"{size(memory.peak)} a rank at the peak ({memory.moment}), predicted; {size(forecast.available)}"
        told.append(("memory", f"{predicted} may be used"))
    else:
        told.append(("memory", f"not predicted: {forecast.unknown}"))
    told.append(("probe", probed(forecast)))
    if not forecast.halves:
        told.append(("out of memory", STOPS))
    told.append(("time", time_words(forecast)))
    return [*told, ("disk", f"{size(disk.needed)} ({disk_words(forecast)}) of {size(disk.free)} that are free")]


def probed(forecast: Forecast) -> str:
    found = forecast.probed
    if not found:
        return f"none: {forecast.why}"
    if not found.fits:
        return "out of memory"
    return f"{short(found.seconds)} s forward and backward, {size(found.passing)} beside weights and moments"


def time_words(forecast: Forecast) -> str:
    """At most, since no micro-batch is larger; worked out from operations where nothing was timed."""
    rate = f"{forecast.tokens / forecast.seconds:,.0f} tokens/s"
    whole = timedelta(seconds=round(forecast.seconds * forecast.steps))
    how = "" if forecast.probed and forecast.probed.fits else ", worked out from operations"
    work = f"{operations(forecast.flops)} a step and rank"
    return f"{short(forecast.seconds)} s a step, {rate}, {whole} in all{how} ({work})"


def disk_words(forecast: Forecast) -> str:
    disk = forecast.disk
    checkpoints = f"{disk.kept} checkpoints of {size(disk.checkpoint)}, " if disk.kept else ""
    features = f", kept features {size(disk.features)}" if disk.features else ""
    return f"{checkpoints}the stage {size(disk.stage)}{features}"


def memory_table(forecast: Forecast) -> Table:
    """What the memory of a rank is for at its peak, and how much each part of a step needs."""
    memory = forecast.memory
    assert memory
    table = Table("at the peak", "", "part of the step", "", title="memory of a rank", title_justify="left")
    parts, phases = list(memory.parts.items()), list(memory.phases.items())
    for number in range(max(len(parts), len(phases))):
        cells: list[str] = []
        for column in (parts, phases):
            name, count = column[number] if number < len(column) else ("", 0)
            cells += [name, size(count) if name else ""]
        table.add_row(*cells)
    return table


def warnings(forecast: Forecast) -> list[str]:
    """What will go wrong."""
    found = []
    if not forecast.fits:
        peak = f"the largest micro-batch needs {size(forecast.memory.peak)}" if forecast.memory else "it is too large"
        found.append(f"this will not fit: {peak}, a rank may take {size(forecast.available)}")
    if not forecast.fits_probe and forecast.shape.rows > 1 and forecast.halves:
        found.append("micro-batches that do not fit are computed in halves: slower, the same result")
    if forecast.disk.needed > forecast.disk.free:
        found.append(
            f"the disk is too small: {size(forecast.disk.needed)} are needed and {size(forecast.disk.free)} are free; "
            f"save less often, or name another train.output_dir"
        )
    return found


def refuse(forecast: Forecast) -> None:
    """Stop where the probe showed that the run would.

    Raises:
        ValueError: memory ran out with micro-batches of one row, which cannot be smaller, or where the engine does not
            make them so; names what would help.
    """
    shape = forecast.shape
    if forecast.fits_probe or (shape.rows > 1 and forecast.halves):
        return
    helps = [f"{lever.change} ({size(lever.peak)})" for lever in forecast.levers]
    if shape.rows > 1 and not any("rows_per_micro_batch" in way for way in helps):
        helps.insert(0, f"train.rows_per_micro_batch {shape.rows // 2} (the same losses)")
    how_many = f"{shape.rows} rows" if shape.rows > 1 else "one row"
    raise ValueError(
        f"out of memory: the largest micro-batch, {how_many} of {shape.length} tokens with {shape.images} images, does "
        f"not fit into {size(forecast.available)}. What would help, with the peak that is predicted for it: "
        f"{', '.join(helps) or 'a larger device'}"
    )


def lever_table(forecast: Forecast) -> Table:
    table = Table("change", "peak", "", title="what would help", title_justify="left")
    for lever in forecast.levers:
        table.add_row(lever.change, size(lever.peak), "fits" if lever.peak <= forecast.available else "")
    return table


def size(count: float) -> str:
    """Bytes as people read them."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1000:
            return f"{short(count)} {unit}"
        count /= 1024
    return f"{short(count)} GiB"


def operations(count: float) -> str:
    for unit in ("", "k", "M", "G"):
        if count < 1000:
            return f"{short(count)} {unit}FLOP"
        count /= 1000
    return f"{short(count)} TFLOP"


def short(number: float) -> str:
    """Three digits, or all of those before the point."""
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"
