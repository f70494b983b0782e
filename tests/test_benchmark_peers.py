"""Our training beside what people use: the same losses, the same tokens, each way in its turn, the right arithmetic."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from itertools import chain
from multiprocessing import Pipe
from pathlib import Path
from typing import Any

import pytest

from conftest import forget_accelerate
from mllm.train import metrics
from test_benchmark import RECIPES, run
from turning import three_steps

sys.path.append(str(RECIPES))

from benchmarks import peers, peers_turns, peers_ways
from benchmarks.page import markdown
from benchmarks.peers_drawn import (
    ACCUMULATION,
    SEQ_LENGTH,
    draw,
    length_of,
    samples_for,
    write_batches,
    write_recipe,
)
from benchmarks.peers_report import facts_table, peers_table
from benchmarks.peers_turns import Trained, heard, in_turn
from benchmarks.peers_ways import WAYS

STEPS = 2
TINY = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("peers")
    draw(folder, samples_for(STEPS), **TINY)
    write_recipe(folder, STEPS)
    write_batches(folder, STEPS)
    return folder


@pytest.fixture
def apart(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Ways are made for a process each: what they leave behind in this one is taken back."""
    monkeypatch.setattr(sys, "argv", sys.argv)
    monkeypatch.setattr(metrics, "REDRAW_SECONDS", metrics.REDRAW_SECONDS)
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)
    forget_accelerate()


@pytest.fixture(scope="module")
def bare(drawn: Path) -> list[tuple[float, int]]:
    return peers_ways.bare(drawn)


@pytest.mark.parametrize("name", ["ours", "trainer", "trl"])
def test_the_losses_of_all_ways_agree_step_by_step_at_the_same_tokens(
    name: str, drawn: Path, bare: list[tuple[float, int]], apart: None
) -> None:
    if name in peers.missing():
        pytest.skip(f"{name} is not installed: {peers.missing()[name]}")
    found = peers.compared({"ours": Trained([1.0], returned=WAYS[name](drawn)), "bare": Trained([1.0], returned=bare)})
    assert found["loss_difference"]["bare"] <= peers.TOLERANCE
    assert len(bare) == STEPS
    assert bare[1][0] < bare[0][0]


def test_batches_hold_each_steps_samples_once_in_as_many_parts(drawn: Path, bare: list[tuple[float, int]]) -> None:
    batches = json.loads((drawn / "batches.json").read_text())
    records = json.loads((drawn / "data.json").read_text())
    assert len(batches) == STEPS * ACCUMULATION
    places = list(chain.from_iterable(batches))
    assert len(set(places)) == len(places)
    # the assistant's words and an end mark for each answer: counted by hand
    answers = [[len(turn["value"].split()) + 1 for turn in record["conversations"][1::2]] for record in records]
    steps = [chain(*batches[first : first + ACCUMULATION]) for first in range(0, len(batches), ACCUMULATION)]
    assert [sum(sum(answers[place]) for place in step) for step in steps] == [tokens for _, tokens in bare]
    assert 1 < peers.padding(drawn)["padded_over_real"] < 3
    assert max(map(length_of, records)) <= SEQ_LENGTH


def test_processes_take_one_step_each_in_turn_and_say_what_they_cost(tmp_path: Path) -> None:
    found = in_turn({"a": three_steps, "b": three_steps}, tmp_path, 3, lambda step: None)
    steps = (tmp_path / "order.txt").read_text().split("\n")[:-1]
    assert steps == ["1 0"] * 2 + ["1 1"] * 2 + ["1 2"] * 2
    for each in found.values():
        assert len(each.seconds) == 2
        assert all(0 < spent < 5 for spent in each.seconds)
        assert 0 <= each.training_bytes < each.peak_bytes
        assert each.returned == [(1.0, 5)] * 3


def test_a_way_that_has_stopped_is_told_with_its_last_words(tmp_path: Path) -> None:
    end, other = Pipe()
    other.close()
    (tmp_path / "trl.log").write_text("ValueError: no such weights")
    with pytest.raises(RuntimeError, match=r"(?s)trl stopped:.*ValueError: no such weights"):
        heard(end, "trl", tmp_path)


def made(**losses: list[tuple[float, int]]) -> dict[str, Any]:
    """Ways of two timed steps: ours takes 1 and 4 seconds, the others twice that."""
    seconds = {name: [2.0, 8.0] if name != "ours" else [1.0, 4.0] for name in losses}
    trained = {name: Trained(seconds[name], 2**30, 2**20, told) for name, told in losses.items()}
    return {**peers.compared(trained), "steps": 2, "missing": {}, "padded_over_real": 1.5, "machine": {"load": [0.0]}}


SAME = [(3.0, 9), (2.0, 10), (1.0, 20)]


def test_a_ratio_is_of_supervised_tokens_a_cpu_second_ours_divided_by_theirs() -> None:
    found = made(ours=SAME, bare=SAME, trainer=SAME, trl=SAME)
    assert (found["ours_vs_bare"], found["ours_vs_trainer"], found["ours_vs_trl"]) == (2.0, 2.0, 2.0)
    assert found["supervised_tokens_per_cpu_second"]["ours"] == pytest.approx(1 / 0.15)
    assert found["supervised_tokens"] == 30
    assert not peers.disagreement(found)


def test_other_losses_or_other_tokens_are_said() -> None:
    near = [(3.0 * (1 + 5e-6), 9), *SAME[1:]]
    assert not peers.disagreement(made(ours=SAME, bare=near))
    far = [(3.0 * (1 + 5e-5), 9), *SAME[1:]]
    assert "bare by 5.0e-05" in peers.disagreement(made(ours=SAME, bare=far))
    assert "trl by inf" in peers.disagreement(made(ours=SAME, trl=[(3.0, 8), *SAME[1:]]))


def test_what_is_not_installed_is_left_out_and_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "find_spec", lambda name: None)
    assert peers.missing() == {"trl": "pip install 'mllm[bench]'"}
    found = made(ours=SAME, bare=SAME, trainer=SAME) | {"missing": peers.missing()}
    assert found["ours_vs_trl"] is None
    page = markdown(peers_table(found)) + markdown(facts_table(found))
    assert "| TRL's SFTTrainer | not installed: pip install 'mllm[bench]' |" in page
    assert "| transformers' Trainer | 3 | 2.00 (2.00 - 2.00) | 1.5 met |" in page
    assert "| 2 | 15 | 1.50 | 0.0 |" in page


def test_no_steps_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit, match="--steps is 0: give a positive number"):
        run(monkeypatch, "peers", "--steps", 0)


@pytest.mark.long
def test_the_command_writes_all_three_ratios_and_keeps_what_was_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(monkeypatch, "peers", "--json", tmp_path / "out.json", "--steps", 26)
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["ours_vs_bare"] >= 0.95
    assert found["ours_vs_trainer"] >= 1.5
    assert found["ours_vs_trl"] >= 1.5 or not find_spec("trl")
    assert max(found["loss_difference"].values()) <= found["tolerance"]


def test_memory_is_that_of_this_process_alone() -> None:
    assert 2**24 < peers_turns.resident() <= peers_turns.peak() < 2**40
