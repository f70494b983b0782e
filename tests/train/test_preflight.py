"""What a run says before its first step, and what stops it there."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from conftest import make_model, make_processor, write_llava
from mllm.data.formats.llava import LlavaSource
from mllm.data.index import Index, build_index
from mllm.data.loader import DataConfig
from mllm.data.plan import Plan
from mllm.data.processor import Processor
from mllm.data.streams.batches import look, open_stream
from mllm.train.forecasting.supervision import check_supervised_share, mask_text
from mllm.train.preflight import preflight
from mllm.train.route import make_plan
from mllm.train.settings import TrainConfig
from mllm.train.trainable import LearningRates, Lora, choose_trainable

SEQ_LENGTH = 96
CONNECTOR = LearningRates(connector=1e-3)


def indexed(folder: Path, processor: Processor) -> Index:
    return build_index([LlavaSource(path=write_llava(folder))], processor, SEQ_LENGTH, progress=False)


def said(path: Path, rates: LearningRates = CONNECTOR, lora: Lora | None = None) -> str:
    """Everything a preflight prints about a LLaVA file."""
    model, processor = make_model(), make_processor()
    choose_trainable(model, rates, lora)
    index = build_index([LlavaSource(path=path)], processor, SEQ_LENGTH, progress=False)
    console = Console(record=True, width=160, file=io.StringIO())
    preflight(console, model, rates, index, Plan.from_lengths(index.length, SEQ_LENGTH, 4), processor, steps=7)
    return console.export_text()


def cells(text: str, part: str) -> list[str]:
    """The row of the table that begins with that name."""
    row = next(line for line in text.splitlines() if f" {part} " in line)
    return [cell.strip() for cell in row.split("│")[1:-1]]


def test_tables_name_what_is_frozen_what_trains_and_the_rates(tmp_path: Path) -> None:
    text = said(write_llava(tmp_path))
    model = make_model()
    counts = {part: sum(p.numel() for p in getattr(model, part).parameters()) for part in ("llm", "connector")}
    assert cells(text, "llm") == ["llm", f"{counts['llm']:,}", "0", "-"]
    assert cells(text, "connector") == ["connector", "0", f"{counts['connector']:,}", "0.001"]


def test_lora_is_counted_beside_the_frozen_llm(tmp_path: Path) -> None:
    text = said(write_llava(tmp_path), LearningRates(connector=1e-3, llm=2e-4), Lora(rank=4))
    _, frozen, trained, rate = cells(text, "llm")
    assert int(frozen.replace(",", "")) > int(trained.replace(",", "")) > 0
    assert rate == "0.0002"


def test_numbers_of_the_run_and_the_first_sample_are_shown(tmp_path: Path) -> None:
    text = said(write_llava(tmp_path))
    samples = "12 read = 12 used + 0 skipped; 0 truncated"
    for words in (samples, "12 of 4 visual tokens", "7 of 4 rows", "28 of 96 tokens", "it is 0", "filled"):
        assert words in text


def test_mask_marks_exactly_the_assistants_words_and_an_image_is_one_word(tmp_path: Path) -> None:
    processor = make_processor()
    shown = mask_text(processor, indexed(tmp_path, processor).sample(2), SEQ_LENGTH)
    assert shown == (
        "<|user|><image>\nwhat is 2 0?<|end|><|assistant|>[[it is 2<|end|>]]"
        "<|user|>what is 2 1?<|end|><|assistant|>[[it is 3<|end|>]]"
    )


def test_of_a_stream_is_told_what_its_first_samples_say(tmp_path: Path) -> None:
    model, processor = make_model(), make_processor()
    choose_trainable(model, CONNECTOR, None)
    data = DataConfig([LlavaSource(path=write_llava(tmp_path))], seq_length=SEQ_LENGTH, stream=True)
    stream = open_stream(data, processor, seed=0)
    console = Console(record=True, width=160, file=io.StringIO())
    preflight(console, model, CONNECTOR, stream, make_plan(stream, data, TrainConfig(tmp_path)), processor, steps=7)
    text = console.export_text()
    for words in ("streamed", "of the first 12 samples", "7 of 8 rows", "it is 0", "what trains"):
        assert words in text
    assert stream.tally.read == 0


def test_labels_of_a_stream_that_are_odd_stop_the_run(tmp_path: Path) -> None:
    processor = make_processor()
    data = DataConfig([LlavaSource(path=write_llava(tmp_path))], seq_length=SEQ_LENGTH, stream=True)
    known = look(open_stream(data, processor, seed=0))
    check_supervised_share(known, processor, SEQ_LENGTH)
    known.items[7].tokens[1][:] = [-100] * known.items[7].length
    with pytest.raises(ValueError, match=r"row 7 has no supervised token"):
        check_supervised_share(known, processor, SEQ_LENGTH)


@pytest.mark.parametrize(("change", "words"), [(lambda n: 0, "no supervised token"), (lambda n: 10**4, "share")])
def test_odd_supervised_share_stops_with_the_sample_and_its_mask(tmp_path: Path, change, words: str) -> None:
    processor = make_processor()
    index = indexed(tmp_path, processor)
    index.supervised = np.array([change(n) for n in index.supervised])
    with pytest.raises(ValueError, match=words) as raised:
        check_supervised_share(index, processor, SEQ_LENGTH)
    message = str(raised.value)
    assert "data.json, row 0" in message
    assert "[[it is 0<|end|>]]" in message


def test_one_silent_sample_among_many_is_the_one_that_is_shown(tmp_path: Path) -> None:
    processor = make_processor()
    index = indexed(tmp_path, processor)
    index.supervised = np.where(np.arange(12) == 7, 0, index.supervised)
    with pytest.raises(ValueError, match=r"row 7 has no supervised token"):
        check_supervised_share(index, processor, SEQ_LENGTH)


def test_usual_share_passes(tmp_path: Path) -> None:
    processor = make_processor()
    check_supervised_share(indexed(tmp_path, processor), processor, SEQ_LENGTH)


def test_square_brackets_in_the_data_are_not_taken_for_colours(tmp_path: Path) -> None:
    """rich reads [red] as markup; data may say anything."""
    path = write_llava(tmp_path)
    path.write_text(path.read_text().replace("it is 0", "it is [/red] [bold] 0"))
    assert "[/red] [bold]" in said(path)
