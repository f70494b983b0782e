"""The benchmark of chat counts what it promises to count."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pytest

RECIPES = Path(__file__).parents[1] / "recipes"
sys.path.append(str(RECIPES))

from benchmarks.chatting import make_processor  # noqa: E402


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmark.py", "chat", *map(str, arguments)])
    runpy.run_path(str(RECIPES / "benchmark.py"), run_name="__main__")


def test_second_turn_computes_no_image_and_few_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "out.json"
    run(monkeypatch, "--json", path, "--tokens", 5, "--repeats", 1, "--only", "small")
    found = json.loads(path.read_text())["small"]
    ours, theirs = found["ways"]["ordinary"], found["ways"]["generate"]
    assert (ours["encoder_calls_first_turn"], ours["encoder_calls_second_turn"]) == (1, 0)
    assert theirs["encoder_calls_second_turn"] == 1
    assert ours["prefilled_second_turn"] < ours["prefilled_first_turn"] / 2
    assert all(found[name] > 0 for name in ("tokens_per_s", "first_token_ms", "second_turn_ms"))
    assert found["second_turn_vs_anew"]["least"] > 0


def test_unknown_size_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit, match="no LLM called 8B: choose of"):
        run(monkeypatch, "--only", "8B")


def test_tokens_that_the_tokenizer_does_not_know_say_nothing() -> None:
    """LLMs of real sizes have more tokens than the benchmark's tokenizer."""
    assert make_processor("so400m-384").tokenizer.decode([151_000, 151_001]) == ""
