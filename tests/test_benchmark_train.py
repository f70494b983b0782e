"""The benchmark of training measures what it says: the same samples and the same loss in every way."""

from __future__ import annotations

import json
import runpy
import sys
from collections import Counter
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

RECIPES = Path(__file__).parents[1] / "recipes"
sys.path.append(str(RECIPES))

from benchmarks import adapting, carried, counted, naive, planning, product, ratios, training  # noqa: E402
from benchmarks.configurations import configurations, default, stage_1, stage_2  # noqa: E402
from benchmarks.counters import traffic  # noqa: E402
from benchmarks.drawn_training import Drawing, draw  # noqa: E402
from benchmarks.page import PAGE, README, filled, markdown, put, quoted, read_results, tables  # noqa: E402
from benchmarks.sizes import LLMS, draw_model  # noqa: E402
from benchmarks.stopwatch import ROOMS, Budget, Enough, Stopwatch  # noqa: E402
from benchmarks.training_report import HEADS, compared, lines, rate_table, remarks, room_lines  # noqa: E402
from mllm.data.loader import PlannedBatches, Share, batches  # noqa: E402
from mllm.data.plan import Plan  # noqa: E402
from mllm.train.forecasting.flops import needed  # noqa: E402
from mllm.train.losses import model_inputs, num_supervised  # noqa: E402
from mllm.train.trainable import choose_trainable  # noqa: E402

CPU = torch.device("cpu")
DRAWING = Drawing("instruct", 16, 56, LLMS["tiny"]["vocab_size"], samples=64, shrink=16)
ROW = replace(default("1.5B"), llm="tiny", encoder="tiny", attention="sdpa", compiled=False)


def first_batches(number: int = 2) -> tuple[Any, list[list[int]], list[Any]]:
    """Index, the samples of each step, the product's batches."""
    index, processor = draw(DRAWING)
    plan = Plan.from_lengths(index.length.tolist(), 256, rows_per_step=2)
    dataset = PlannedBatches(index, plan, processor, Share(0, 1, 2))  # type: ignore[arg-type]
    samples = [[sample for row in plan.rows(step) for sample in row] for step in range(number)]
    return index, samples, list(batches(dataset, 0, number, 0))


def model() -> Any:
    built = draw_model("tiny", "tiny", CPU, torch.float32)
    choose_trainable(built, ROW.rates, None)
    return built


def test_a_drawn_sample_is_as_long_as_its_index_says() -> None:
    index, processor = draw(DRAWING)
    for number in range(len(index)):
        sample = index.sample(number)
        input_ids, labels = processor.tokens(sample)
        assert len(input_ids) == len(labels) == index.length[number]
        assert sum(label >= 0 for label in labels) == index.supervised[number]
        assert input_ids.count(processor.image_token_id) == 16 * index.images[number]
    assert draw(DRAWING)[1].tokens(index.sample(7)) == processor.tokens(index.sample(7))


def test_the_work_of_samples_is_the_work_of_their_batches() -> None:
    index, samples, read = first_batches()
    for numbers, batch in zip(samples, read, strict=True):
        assert training.work_of(index, numbers) == needed(batch)


def test_the_naive_loss_is_the_product_s_loss() -> None:
    own = model()
    index, samples, read = first_batches(1)
    data = naive.Samples(index, draw(DRAWING)[1], own.vision_encoder.normalisation)
    padded = naive.padded([data[number] for number in samples[0]])
    mean = naive.NaiveLlava(own)(**padded)
    inputs, supervised = model_inputs(read[0], CPU), num_supervised(read[0])
    torch.testing.assert_close(product.NextToken(own)(**inputs) / supervised, mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(product.AllLogits(own)(**inputs) / supervised, mean, rtol=1e-5, atol=1e-6)


def test_padded_batches_come_spread_so_that_a_dozen_stands_for_all() -> None:
    lengths = draw(replace(DRAWING, samples=1024))[0].length
    number, batch = len(lengths) // naive.BATCH, naive.BATCH
    spread = list(islice(naive.spread(lengths.tolist(), batch), number))
    shuffled = list(islice(naive.order(len(lengths), batch), number))
    assert sorted(map(tuple, spread)) == sorted(map(tuple, shuffled))

    def off(batches: list[list[int]]) -> float:
        """How far a dozen in a row may be from all, in positions of a batch."""
        positions = np.array([lengths[numbers].max() for numbers in batches])
        dozens = np.lib.stride_tricks.sliding_window_view(positions, 12).mean(-1)
        return float(abs(dozens / positions.mean() - 1).max())

    assert max(lengths[spread[0]]) == lengths.max()
    assert off(spread) < 0.5 * off(shuffled)


def test_the_rate_on_the_mix_is_that_of_all_batches_where_a_position_costs_the_same() -> None:
    index, _ = draw(DRAWING)
    lengths = index.length
    every = list(islice(naive.order(len(lengths), 8), len(lengths) // 8))
    seconds = [0.001 * carried.padded_positions(index, [numbers]) for numbers in every]
    whole = lengths.sum() / sum(seconds)
    for timed in (slice(0, 3), slice(4, 6)):
        positions = carried.padded_positions(index, every[timed])
        found = carried.tokens_per_second(carried.padded_fill(index, 8), positions, sum(seconds[timed]))
        assert found == pytest.approx(whole)
        assert lengths[np.concatenate(every[timed])].sum() / sum(seconds[timed]) != pytest.approx(whole, rel=0.01)


def test_kept_rows_are_carried_to_the_mix_by_the_batches_that_were_timed() -> None:
    """Numbers as an H200 left them: five shuffled batches of 256."""
    sizes = {"way": "naive", "kind": "instruct", "encoder": "so400m-384", "llm": "7B", "batch": 16}
    timed = {"warm_up": 6, "steps": 5, "tokens_per_step": 14922.6, "tokens_per_second_mean": 5088.4}
    kept = {"name": "S2 naive 7B", **sizes, **timed, "tokens_per_second": 5920.6}
    found = carried.add(kept)
    assert found["timed_fill"] == pytest.approx(0.6991, abs=1e-4)
    assert found["fill"] == pytest.approx(0.6146, abs=1e-4)
    assert found["tokens_per_second_mix"] == pytest.approx(5088.4 * found["fill"] / found["timed_fill"])
    assert carried.add(found) is found
    assert carried.add({"error": "out of memory"}) == {"error": "out of memory"}
    with pytest.raises(ValueError, match="S2 naive 7B: 74613 tokens in the timed batches"):
        carried.add({**kept, "tokens_per_step": 1.0})


def test_the_words_of_the_page_have_the_ratios_of_its_file() -> None:
    found = read_results()["train-h200"]
    told = {name: compared(found["rows"][name], found) for name in ("S2 7B", "B4 1.5B")}
    page, readme = (path.read_text().replace("\n", " ") for path in (PAGE, README))
    assert "**{median:.2f}** by medians, **{mean:.2f}** by tokens over time".format(**told["S2 7B"]) in page
    assert "**{mix:.2f}** carried to the mix".format(**told["S2 7B"]) in page
    assert "{median:.2f} by medians and {mix:.2f} on the mix".format(**told["B4 1.5B"]) in page
    assert "is {mix:.2f} times the naive padded step".format(**told["S2 7B"]) in readme
    assert "({mean:.2f} by tokens over time".format(**told["S2 7B"]) in readme
    assert "{median:.2f} by medians: these padded less".format(**told["S2 7B"]) in readme


def test_every_configuration_has_a_name_of_its_own_and_one_beside_it() -> None:
    names = [row.name for row in configurations()]
    assert max(Counter(names).values()) == 1
    known = {row.name for llm in ("1.5B", "7B") for row in (*stage_1(llm), *stage_2(llm))}
    assert known == set(names) - {"B4 0.5B", "B4 3B", "CLIP 1.5B"}
    assert all(row.beside in ("", *names) for row in configurations())


def test_what_fails_says_so_and_the_rest_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def draw_some(llm: str, *arguments: Any) -> nn.Module:
        if not told:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate much")
        return draw_model(llm, *arguments)

    told: list[int] = []
    monkeypatch.setattr(training, "draw_model", draw_some)
    monkeypatch.setattr(planning, "budget_of", lambda *_: Budget(warm_up=1, steps=2, rooms=1))
    monkeypatch.setattr(training, "TINY_TOKENS", 128)
    rows = training.chosen(["B4 1.5B", "U 1.5B"])
    found = training.measure(rows, 1.0, False, lambda found: told.append(len(found["rows"])), lambda words: None, CPU)
    assert told == [1, 2]
    assert found["rows"]["B4 1.5B"]["error"] == "out of memory"
    row = found["rows"]["U 1.5B"]
    assert row["steps"] == 2
    assert row["tokens_per_second_mix"] > 0
    assert {name: len(each) for name, each in row["each"].items()} == {"seconds": 2, "tokens": 2, "positions": 2}
    assert row["recompiled"] == 0
    found["machine"] = {"gpu": "an H200"}
    assert [len(line) for line in lines(found)] == [len(HEADS)] * 2
    assert len(room_lines(found)) == 1
    table = markdown(rate_table(found)).splitlines()
    assert [line.count("|") for line in table] == [len(HEADS) + 1] * 4
    assert "out of memory" in table[2]


def test_another_process_goes_on_where_a_device_was_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(row: Any, *_: Any) -> dict[str, Any]:
        return {"error": "an illegal access"} if row.name == "B0 1.5B" else {"tokens_per_second": 1.0}

    kept: list[dict[str, Any]] = []
    monkeypatch.setattr(training, "attempt", lost)
    monkeypatch.setattr(training, "works", lambda device: False)
    rows = training.chosen(["B0 1.5B", "B4 1.5B", "U 1.5B"])
    with pytest.raises(training.DeviceLost, match="an illegal access"):
        training.measure(rows, 1.0, False, kept.append, lambda words: None, CPU)
    assert list(kept[-1]["rows"]) == ["B4 1.5B", "B0 1.5B"]
    found = training.measure(rows, 1.0, False, kept.append, lambda words: None, CPU, known=kept[-1])
    assert [list(row)[-2] for row in found["rows"].values()] == ["tokens_per_second", "error", "tokens_per_second"]


def test_a_name_that_nothing_begins_with_is_refused() -> None:
    with pytest.raises(ValueError, match=r"no configuration begins with .*B9.*there are B4 1\.5B"):
        training.chosen(["B9"])


def test_padded_batches_and_adapted_steps_are_halved_where_memory_runs_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tried: list[int] = []

    def one(*arguments: Any) -> dict[str, Any]:
        tried.append(arguments[-1])
        if arguments[-1] > 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return {"batch": arguments[-1]}

    monkeypatch.setattr(training, "one", one)
    adapted, padded, _ = stage_2("7B")
    answers = [training.attempt(row, Budget(), CPU, lambda words: None) for row in (padded, default("7B"), adapted)]
    assert tried == [16, 8, 4, *[16], *[16, 8, 4]]
    assert answers == [{"batch": 4}, {"error": "out of memory"}, {"batch": 4}]


def test_the_rooms_of_a_step_make_up_the_step() -> None:
    parts = nn.ModuleDict({"encoder": nn.Linear(4, 4), "LLM": nn.Linear(4, 4)})
    whole = nn.Sequential(parts["encoder"], parts["LLM"])
    optimizer = torch.optim.SGD(whole.parameters(), lr=0.1)
    watch = Stopwatch(Budget(warm_up=3, steps=4, rooms=5), CPU, rooms=dict(parts))
    watch.look_at(whole)
    steps = 0
    with watch.running():
        for _ in watch.loads(iter(range(100))):
            whole(torch.ones(1, 4)).sum().backward()
            optimizer.step()
            steps += 1
    assert steps == 3 + 4 + 5 - 1  # the last one ends it
    assert (watch.warmed_up, len(watch.step_seconds())) == (3, 4)
    spent = watch.room_seconds()
    assert set(spent) == set(ROOMS) - {"connector"}
    began, ended = watch.marks[0][1], watch.marks[-1][1]
    assert sum(spent.values()) == pytest.approx((ended - began) / 5)


def test_a_step_of_several_micro_batches_is_measured_over_as_many() -> None:
    budget = Budget(warm_up=10, steps=40, fewest=5, rooms=4).over(8)
    assert (budget.warm_up, budget.steps, budget.fewest, budget.rooms) == (2, 5, 3, 1)


def test_enough_leaves_no_hook_behind() -> None:
    part = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(part.parameters(), lr=0.1)
    watch = Stopwatch(Budget(warm_up=1, steps=1, rooms=1), CPU)
    with watch.running():
        raise Enough
    optimizer.step()
    assert watch.done == 0


def test_what_is_counted_keeps_what_is_asked() -> None:
    found = counted.measure(steps=1) | adapting.counts()
    assert found.keys() == counted.ASKED.keys()
    assert found["flops_over_arithmetic"] == pytest.approx(1, rel=0.02)
    assert found["padded_over_packed_flops"] >= 1.7
    assert found["frozen_over_trained_flops"] == pytest.approx(2 / 3, abs=0.005)
    assert found["frozen_over_trained_bytes"] <= 0.85
    assert found["packed_over_padded_bytes"] <= 0.80
    assert found["logit_rows_over_supervised"] <= 1
    assert found["fill"] >= 0.995
    assert found["waits"] == 0
    assert found["lora_operations"] <= 0.70
    assert found["lora_bytes"] <= 0.35


def test_traffic_counts_what_is_computed_and_not_views() -> None:
    one = torch.zeros(2, 3)
    found = traffic(lambda: (one.t() * 2).t())
    assert (found.operations, found.bytes) == (1, 2 * 6 * 4)


def test_all_ways_take_turns_with_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"LLM": "tiny", "ENCODER": "tiny", "SHRINK": 36, "TOKENS": 512, "BATCH": 8}.items():
        monkeypatch.setattr(ratios, name, value)
    seconds = ratios.take_turns(1, lambda words: None)
    assert {name: len(each) for name, each in seconds.items()} == dict.fromkeys(
        ("ours", "bare", "all logits", "padded"), 1
    )
    assert all(each[0] > 0 for each in seconds.values())


def test_on_a_cpu_ratios_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alike = {"ours": [2.0, 2.2], "bare": [2.0, 2.0], "all logits": [3.0, 2.4], "padded": [4.0, 3.0]}
    monkeypatch.setattr(ratios, "take_turns", lambda pairs, say: alike)
    monkeypatch.setattr(counted, "measure", lambda: dict.fromkeys(counted.ASKED, 1.0))
    monkeypatch.setattr(adapting, "counts", dict)
    monkeypatch.setattr(adapting, "ways", lambda: dict.fromkeys(("peft", "fast"), lambda: sum(range(1000))))
    path = tmp_path / "out.json"
    monkeypatch.setattr(sys, "argv", ["benchmark.py", "train", "--json", str(path), "--pairs", "2"])
    runpy.run_path(str(RECIPES / "benchmark.py"), run_name="__main__")
    found = json.loads(path.read_text())["ratios"]
    assert found["ours_over_bare"] == {"median": 1.05, "least": 1.0, "greatest": 1.1}
    assert found["padded_over_packed"]["median"] == 1.75
    assert found["peft_over_fast_lora"]["median"] > 0


def test_the_page_is_made_of_its_files() -> None:
    results = read_results()
    assert results
    assert PAGE.read_text() == filled(PAGE.read_text(), results)
    readme, ratio = README.read_text(), results["train-cpu"]["ratios"]["ours_over_bare"]["median"]
    assert readme == quoted(readme, results)
    assert f"our loop with its loader costs {ratio:.2f} times the CPU" in readme.replace("\n", " ")


def test_a_page_without_a_place_for_a_file_is_refused() -> None:
    with pytest.raises(ValueError, match=r"0 blocks <!-- cpu --> for cpu\.json"):
        put("words", "cpu", "tables")


def test_a_step_far_slower_than_the_others_is_told() -> None:
    rows = {
        "even": {"each": {"seconds": [1.0, 2.0, 3.0], "positions": [10, 20, 30]}},
        "chance": {"each": {"seconds": [1.0, 1.1, 4.0], "positions": [10, 10, 10]}},
        "kept": {"tokens_per_second": 1.0},
    }
    assert remarks({"rows": rows}) == " Steps far slower than the median: chance (1 of 3)."


def test_configurations_without_time_are_named_and_have_no_row() -> None:
    found = read_results()["train-h200"]
    late = {"error": f"{planning.NO_TIME} of --minutes 1"}
    told = tables({**found, "rows": {**found["rows"], "B4 3B": late, "CLIP 1.5B": late}})
    named = told.splitlines()[0].partition("No time was left for ")[2]
    assert all(name in named for name in ("B4 3B", "CLIP 1.5B"))
    assert "B4 1.5B" not in named
    assert not any(f"| {name} |" in told for name in ("B4 3B", "CLIP 1.5B"))
    assert "| B4 1.5B |" in told
