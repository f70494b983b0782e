"""Which samples of a data set are worth learning from: scores, thresholds, copies, leakage.

    python data_scripts/filter.py data.json --out runs/kept --min-words 3 --min-side 200 --duplicates 6
    accelerate launch data_scripts/filter.py pairs.jsonl --out runs/kept --clip HUB_ID --min-clip 0.28
    python data_scripts/filter.py train.json --out runs/kept --benchmark PATH/benchmark/images

Enters: whatever `data.sources` takes. Leaves, in `--out`: `kept.jsonl` (ids), `removed.jsonl` (ids and why),
`scores.jsonl` (every score of every sample), `summary.json`, with `--records` the kept records themselves, and
`measured/`, which the same command goes on from when it was stopped: other thresholds measure nothing again. Ranks and
workers share the work and change no score. What cannot be read is removed and named. Exit code: 0 done, 2 it could not
be done, 130 stopped by Ctrl-C.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console

from mllm.data.crew import cores
from mllm.data.curation.door import run
from mllm.data.curation.filters.benchmark import read_benchmark
from mllm.data.curation.filters.outside import Scores
from mllm.data.curation.filters.rules import Rules
from mllm.data.curation.filters.store import open_store
from mllm.data.curation.filters.summary import show, summarise
from mllm.data.curation.filters.verdict import Benchmark, decide
from mllm.data.curation.filters.work import kinds_for, lines_of, measure
from mllm.data.curation.filters.written import check_writable, whole, write_lists, write_records
from mllm.data.curation.shards.folder import held
from mllm.data.curation.source_options import in_words, source_of
from mllm.evaluate.clip_score import ClipScorer
from mllm.quiet import quiet_libraries

NO_RULES = Rules()
PATIENCE = timedelta(days=7)
"""How long a rank waits for another that has more to do."""


def main(
    path: tyro.conf.Positional[str],
    out: Path,
    rules: Annotated[Rules, tyro.conf.arg(name="")] = NO_RULES,
    clip: str = "",
    scores: str = "",
    score_key: str = "",
    benchmark: tuple[Path, ...] = (),
    format: str = "auto",
    image_dir: str | None = None,
    split: str = "",
    subset: str = "",
    options: str = "",
    records: bool = False,
    workers: int | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
    json_output: Annotated[bool, tyro.conf.arg(name="json")] = False,
) -> None:
    """Filter a data set.

    Args:
        path: File, folder, glob, URL or `hub:OWNER/NAME`, as in `data.sources`.
        out: The folder to write.
        rules: What a sample must be.
        clip: Hub id or folder of a CLIP or SigLIP model that scores image and words.
        scores: File of scores that another program gave, by id: JSON lines, JSON, CSV or Parquet.
        score_key: Its column of scores; `score`, or the only one that ends so, by default.
        benchmark: Folders of images that must not be learned from.
        format: Name of the format; by default the records say what they are.
        image_dir: Folder or zip archive that relative image paths start from.
        split: Which split, of a path that holds several.
        subset: Which part of a data set of the Hub that has several.
        options: The format's other options as YAML, e.g. '{text: {weights: {alt: 1, dense: 2}}}'.
        records: Write the kept records too, into files like those they came from (JSON lines and lists).
        workers: Processes of each rank that read and decode; as many as there are cores by default.
        overwrite: Measure anew where the folder holds scores of something else.
        dry_run: Measure and tell, but write none of the lists.
        json_output: Print the summary as JSON instead of a table.
    """
    check(rules, clip, scores, benchmark, workers)
    source = source_of(path, format, image_dir, split, subset, options)
    if records:
        check_writable(source)
    ranks = join_ranks()
    console = Console(quiet=not ranks.is_main_process or json_output)
    console.print(f"{path}: {in_words(source)}", highlight=False)
    workers = max(1, cores() // ranks.num_processes) if workers is None else workers

    with held(out) if ranks.is_main_process else nullcontext():
        if ranks.is_main_process:
            given = Scores(scores, score_key) if scores else None
            pictures = Benchmark(*read_benchmark(list(benchmark), workers)) if benchmark else None
            open_store(out / "measured", source, workers, overwrite)
        scorer = ClipScorer(clip, ranks.device) if clip else None
        ranks.wait_for_everyone()
        kinds = kinds_for(rules, bool(benchmark), scorer)
        store = measure(ranks, source, out / "measured", kinds, scorer, workers)
        if not ranks.is_main_process:
            return
        verdict = decide(lines_of(store, kinds, scorer), rules, given, pictures)
        summary = summarise(store, verdict, source)
        if not dry_run:
            kept = write_lists(out, lines_of(store, kinds, scorer), store.faults, verdict, given)
            if records:
                summary["records"] = [str(file) for file in write_records(out, source, kept)]
            with whole(out / "summary.json") as file:
                json.dump(summary, file, indent=1)
    show(console, summary, rules, None if dry_run else out)
    if json_output:
        print(json.dumps(summary))


def check(rules: Rules, clip: str, scores: str, benchmark: Sequence[Path], workers: int | None) -> None:
    """Refuse what contradicts itself before anything is read."""
    if rules.min_clip is not None and not clip:
        raise ValueError("--min-clip needs a model: name it with --clip, e.g. openai/clip-vit-base-patch32")
    if (rules.min_score is not None) != bool(scores):
        raise ValueError("--scores and --min-score need each other: give both")
    if workers is not None and workers < 0:
        raise ValueError(f"--workers is {workers}: give 0 or more")
    for folder in benchmark:
        if not folder.is_dir():
            raise ValueError(f"--benchmark {folder} is no folder: give the folder of the benchmark's image files")


def join_ranks() -> Any:
    """Those of `accelerate launch`, or this process alone.

    Raises:
        ValueError: ranks were started that do not see each other.
    """
    from accelerate import Accelerator
    from accelerate.utils import InitProcessGroupKwargs

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # workers are started after words were tokenised
    quiet_libraries()
    ranks = Accelerator(kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)])
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started != ranks.num_processes:
        raise ValueError(
            f"{started} ranks were started, but Accelerate found no GPU for them: on CPUs start them with "
            f"ACCELERATE_USE_CPU=true torchrun --nproc_per_node {started} data_scripts/filter.py"
        )
    return ranks


def door(arguments: list[str] | None = None) -> int:
    """The command; a mistake is one line, not a traceback."""
    return run(main, __doc__, arguments, stopped="stopped: the same command goes on from here")


if __name__ == "__main__":
    sys.exit(door())
