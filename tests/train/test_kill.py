"""`kill -9` changes nothing: a few deaths of a small run. The campaign with the launcher is in `tests/long/`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from conftest import make_processor
from killing import Campaign, Forked, Running, assert_same, note_samples
from mllm.train.stage_folder import save_stage
from mllm.train.trainable import Lora
from runs import LORA, chosen_model, run, settings, write_llava

STEPS = 24


def starts(data: Path, out: Path) -> Callable[[str], Running]:
    """Start a run with dropout, or go on with it."""
    more = {**LORA, "lora": Lora(rank=4, alpha=8, dropout=0.3)}

    def begin(record: str) -> None:
        note_samples(record)
        train = settings(out, steps=STEPS, save_every=1, **more)
        model = run(data, train, chosen_model(train), resume=True)
        save_stage(out, model, make_processor(), "model: {}\n")

    return lambda record: Forked(lambda: begin(record), out.parent / "said")


def test_killed_run_goes_on_to_the_same_losses_weights_and_samples(tmp_path: Path) -> None:
    data = write_llava(tmp_path, records=20)
    whole, killed = (
        Campaign(tmp_path / name / "out", tmp_path / name / "records", starts(data, tmp_path / name / "out"))
        for name in ("whole", "killed")
    )
    whole.to_the_end()
    for moment in (killed.in_a_save, killed.in_a_step, killed.in_a_save):
        killed.killed(moment)
    killed.to_the_end()
    assert_same(killed, whole)
    assert killed.counts["kills"] == killed.counts["resumes"] == 3
    assert killed.counts["kills during a save"] >= 1
