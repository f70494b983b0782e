"""Held-out losses: exact, the same on any number of ranks, without a trace in the run, and loud where a model is
blind."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator

from conftest import make_model, make_processor, picture, write_llava
from engines import make_ready
from engines import start as start_engine
from mllm.config import RunConfig, validate
from mllm.data.collate import collate
from mllm.data.formats.llava import LlavaSource
from mllm.data.held_out import SEED, index_held_out
from mllm.data.index import Index, build_index
from mllm.data.loader import DataConfig
from mllm.data.other_pictures import lenders
from mllm.data.packing import join
from mllm.data.streams.batches import open_stream
from mllm.models.multimodal import MultimodalLM
from mllm.stage import start
from mllm.train.held_out import HeldOut
from mllm.train.loop import fit
from mllm.train.losses import NextToken, model_inputs, num_supervised
from mllm.train.route import make_plan
from mllm.train.trainable import LearningRates, Lora
from mllm.train.watching.gap import conclude, terms
from mllm.types import Batch, Sample
from runs import SEQ_LENGTH, chosen_model, metrics, on_two_ranks, run, settings, weights

CPU = torch.device("cpu")


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def held_out(folder: Path) -> dict[int, dict[str, float]]:
    return {line["step"]: line["held_out"] for line in lines(folder) if "held_out" in line}


def some_text_only(path: Path) -> Path:
    """Take the picture from every third record."""
    records = json.loads(path.read_text())
    for record in records[::3]:
        del record["image"]
        record["conversations"][0]["value"] = record["conversations"][0]["value"].removeprefix("<image>\n")
    path.write_text(json.dumps(records))
    return path


def index_of(path: Path, number: int) -> Index:
    return build_index([LlavaSource(path=path)], make_processor(), SEQ_LENGTH, progress=False, held_out=number)


def alone(model: MultimodalLM, samples: list[tuple[Sample, list[Any]]]) -> float:
    """The mean loss per supervised token of samples with those images, each in a batch of its own."""
    processor, loss, tokens = make_processor(), 0.0, 0
    for sample, images in samples:
        batch = collate([join([processor(Sample(sample.id, sample.messages, images))], (3, 28, 28))], (3, 28, 28))
        with torch.no_grad():
            loss += float(NextToken(model)(**model_inputs(batch, CPU)))
        tokens += num_supervised(batch)
    return loss / tokens


def ask(index: Index, model: MultimodalLM, folder: Path, **changes: Any) -> dict[str, float]:
    """What held-out samples say about a model as it is."""
    config = settings(folder, rows_per_micro_batch=2)
    data = DataConfig(seq_length=SEQ_LENGTH, num_workers=0, held_out=len(index), **changes)
    accelerator = Accelerator(cpu=True)
    objective = NextToken(model)
    told: list[str] = []

    def beat(phase: str, batch: Batch, slow: bool) -> None:
        told.extend(name for row in batch["sample_ids"] for name in row)

    examiner = HeldOut(accelerator, index, make_processor(), data, config, last_step=1, beat=beat)
    found = examiner.at(1, objective, model)["held_out"]
    assert sorted(told) == sorted(index.ids.to_pylist())
    return found


@pytest.mark.parametrize("packing", [True, False], ids=["packed", "padded"])
def test_held_out_losses_are_those_of_each_sample_alone(tmp_path: Path, packing: bool) -> None:
    path, model = some_text_only(write_llava(tmp_path, 12)), make_model()
    index = index_of(path, 7).held_out
    assert index
    samples = [index.sample(number) for number in range(7)]
    assert any(not sample.images for sample in samples)
    lender = lenders([tuple(map(str, sample.images)) for sample in samples], SEED)
    borrowed = [samples[other].images if other is not None else [] for other in lender]
    grey = [[picture(0).point(lambda _: 128)] * len(sample.images) for sample in samples]
    found = ask(index, model, tmp_path / "out", packing=packing)
    assert found["loss"] == pytest.approx(alone(model, [(sample, sample.images) for sample in samples]), rel=1e-5)
    assert found["shuffled"] == pytest.approx(alone(model, list(zip(samples, borrowed, strict=True))), rel=1e-5)
    assert found["blank"] == pytest.approx(alone(model, list(zip(samples, grey, strict=True))), rel=1e-5)
    assert found["gap"] == pytest.approx(found["shuffled"] - found["loss"], abs=1e-9)
    assert len({found[name] for name in ("loss", "shuffled", "blank")}) == 3


def test_run_is_bit_for_bit_the_same_with_and_without_asking(tmp_path: Path) -> None:
    """With dropout, kept features and gradient checkpointing: what draws, remembers, or has a mode."""
    path, lora = write_llava(tmp_path, 12), Lora(rank=4, alpha=8, dropout=0.5)
    more: dict[str, Any] = {"lora": lora, "learning_rate": LearningRates(connector=1e-2, llm=1e-2), "steps": 5}
    left = {}
    for name, changes in {"silent": {"eval_every": None}, "asked": {"eval_every": 1}}.items():
        config = settings(tmp_path / name, feature_cache=1.0, gradient_checkpointing=True, **more, **changes)
        model = chosen_model(config)
        after = weights(run(path, config, model, held_out=4))
        assert model.feature_cache
        left[name] = after, torch.random.get_rng_state(), set(model.feature_cache.kept)
    assert metrics(tmp_path / "silent") == metrics(tmp_path / "asked")
    assert all(torch.equal(tensor, left["asked"][0][name]) for name, tensor in left["silent"][0].items())
    assert torch.equal(left["silent"][1], left["asked"][1])
    assert left["silent"][2] == left["asked"][2]
    assert held_out(tmp_path / "asked").keys() == {1, 2, 3, 4, 5}
    assert held_out(tmp_path / "silent") == {5: held_out(tmp_path / "asked")[5]}


def test_held_out_samples_are_never_trained_on_and_counted_as_such(tmp_path: Path) -> None:
    path = write_llava(tmp_path, 12)
    index = index_of(path, 5)
    assert index.held_out
    taken, kept = set(index.held_out.ids.to_pylist()), set(index.ids.to_pylist())
    assert (len(taken), len(kept), taken & kept) == (5, 7, set())
    run(path, settings(tmp_path / "out", steps=3), held_out=5)
    told = json.loads((tmp_path / "out" / "ledger.json").read_text())
    assert (told["read"], told["used"], told["filtered"]) == (12, 7, {"held out": 5})


def test_the_same_samples_are_held_out_whatever_the_order_of_the_file(tmp_path: Path) -> None:
    path = write_llava(tmp_path, 12)
    first = index_of(path, 5).held_out
    path.write_text(json.dumps(json.loads(path.read_text())[::-1]))
    again = index_of(path, 5).held_out
    assert first
    assert again
    assert set(first.ids.to_pylist()) == set(again.ids.to_pylist())


def on_rank(rank: int, path: Path, folder: Path, engine: str) -> None:
    """Seven samples, one a row, for two ranks: one of them gets an empty row."""
    accelerator = start_engine(engine, folder.parent)
    run(path, ranks_config(folder), accelerator=accelerator, held_out=7, packing=False)
    torch.distributed.destroy_process_group()


def ranks_config(folder: Path) -> Any:
    return settings(folder, steps=4, rows_per_micro_batch=1, eval_every=2)


@pytest.mark.parametrize("engine", ["ddp", "zero3", pytest.param("fsdp2", marks=pytest.mark.long)])
def test_two_ranks_find_the_losses_of_one_process_and_train_on_as_it_does(tmp_path: Path, engine: str) -> None:
    make_ready(engine, tmp_path)
    path = some_text_only(write_llava(tmp_path, 14))
    run(path, ranks_config(tmp_path / "one"), held_out=7, packing=False)
    on_two_ranks(on_rank, path, tmp_path / "two", engine)
    one, two = held_out(tmp_path / "one"), held_out(tmp_path / "two")
    assert one.keys() == two.keys() == {2, 4}
    for step, losses in one.items():
        assert two[step] == pytest.approx(losses, rel=1e-5, abs=1e-6)
    for ours, theirs in zip(metrics(tmp_path / "one"), metrics(tmp_path / "two"), strict=True):
        assert theirs == pytest.approx(ours, rel=1e-4)


def pictured_answers(folder: Path, names: str) -> Path:
    """The same question about each picture, whose answer nothing but the picture tells."""
    folder.mkdir(parents=True)
    records = []
    for row, name in enumerate(names):
        picture(row).save(folder / f"{row}.png")
        turns = [{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": name * 3}]
        records.append({"id": f"{folder.name}{row}", "image": f"{row}.png", "conversations": turns})
    (folder / "data.json").write_text(json.dumps(records))
    return folder / "data.json"


def test_model_that_looks_has_a_gap_and_one_whose_connector_is_dead_is_warned_of(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = pictured_answers(tmp_path / "train", "abcdefgh")
    asked = [LlavaSource(path=pictured_answers(tmp_path / "asked", "abcdefgh"))]
    rates = LearningRates(connector=1e-2, llm=1e-2)
    config = settings(tmp_path / "looks", steps=60, learning_rate=rates, schedule="constant", eval_every=60)
    run(path, config, held_out=asked)
    told = held_out(tmp_path / "looks")[60]
    assert told["gap"] > 0.5
    assert told["blank"] > told["loss"] + 0.5
    assert "does not look" not in capsys.readouterr().out
    blind = settings(tmp_path / "blind", steps=4, learning_rate=LearningRates(llm=1e-2), eval_every=4)
    model = chosen_model(blind)
    for weight in model.connector.parameters():
        weight.data.zero_()
    run(path, blind, model, held_out=asked)
    assert held_out(tmp_path / "blind")[4]["gap"] == pytest.approx(0, abs=1e-9)
    assert "warning: the model does not look at the images" in capsys.readouterr().out


def test_no_warning_during_the_warm_up(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(write_llava(tmp_path, 12), settings(tmp_path / "out", steps=4, warmup=0.5, eval_every=2), held_out=6)
    assert capsys.readouterr().out.count("warning: the model does not look") == 1


def summed(gaps: list[float], loss: float = 2.0) -> Any:
    """Samples of ten tokens with those gaps a token."""
    d, tokens = 10 * torch.tensor(gaps, dtype=torch.float64), torch.full((len(gaps),), 10.0, dtype=torch.float64)
    right = loss * tokens
    return conclude(terms(tokens, right, right + d, right, torch.ones(len(gaps), dtype=torch.bool)))


def test_gap_must_be_a_hundredth_of_the_loss_and_two_standard_errors() -> None:
    assert summed([0.03, 0.03, 0.03, 0.03]).looks is True
    assert summed([0.015, 0.015, 0.015, 0.015]).looks is False  # sure, but small
    assert summed([1.0, -0.9, 1.0, -0.8]).looks is False  # large, but chance
    assert summed([1.0, 0.9, 1.0, 0.8]).looks is True
    assert summed([1.0]).looks is None
    assert summed([1.0, 0.9]).gap == pytest.approx(0.95)
    assert summed([1.0, 0.9], loss=float("nan")).looks is None


def test_standard_error_is_that_of_samples_of_one_length() -> None:
    """For equal lengths the ratio's error is the plain one of a mean: two of them is where the verdict turns."""
    gaps = torch.tensor([0.1, 0.5, 0.3, 0.7, 0.2], dtype=torch.float64)
    error = float(gaps.std() / 5**0.5)
    middle = gaps - gaps.mean()
    assert summed((middle + 2.01 * error).tolist()).looks is True
    assert summed((middle + 1.99 * error).tolist()).looks is False


def test_samples_without_other_images_to_borrow_leave_one_loss(tmp_path: Path) -> None:
    path = write_llava(tmp_path, 6)
    records = json.loads(path.read_text())
    for record in records:
        record["image"] = "images/0.png"
    path.write_text(json.dumps(records))
    index = index_of(path, 3).held_out
    assert index
    assert ask(index, make_model(), tmp_path / "out").keys() == {"loss"}


def test_held_out_sample_whose_image_is_gone_is_left_out_of_all_three_losses(tmp_path: Path) -> None:
    path, model = write_llava(tmp_path, 12), make_model()
    index = index_of(path, 6).held_out
    assert index
    gone = index.sample(2)
    Path(str(gone.images[0])).unlink()
    found = ask(index, model, tmp_path / "out")
    lender = lenders([(str(index.sample(number).images[0]),) for number in range(6)], SEED)
    left = [index.sample(number) for number in range(6) if number != 2 and lender[number] != 2]
    assert found["loss"] == pytest.approx(alone(model, [(sample, sample.images) for sample in left]), rel=1e-5)


def test_stream_is_asked_with_sources_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "asked").mkdir()
    asked = [LlavaSource(path=write_llava(tmp_path / "asked", 5))]
    config = settings(tmp_path / "out", steps=2)
    config.output_dir.mkdir()
    data = DataConfig(
        [LlavaSource(path=write_llava(tmp_path))], held_out=asked, seq_length=96, num_workers=0, stream=True
    )
    processor = make_processor()
    stream = open_stream(data, processor, 0)
    index_held_out(stream, data, processor)
    plan = make_plan(stream, data, config)
    fit(Accelerator(cpu=True), chosen_model(config), processor, stream, plan, data, config)
    assert held_out(tmp_path / "out").keys() == {2}
    data.held_out = 3
    with pytest.raises(ValueError, match=r"list sources under data\.held_out"):
        index_held_out(stream, data, processor)


def test_what_cannot_be_asked_is_an_error_that_says_what_to_do(
    llava_folder: Callable[..., Path], tmp_path: Path
) -> None:
    path = llava_folder(6)
    with pytest.raises(ValueError, match=r"eval_every without data\.held_out"):
        start(RunConfig(train=settings(tmp_path / "out", eval_every=2)))
    with pytest.raises(ValueError, match=r"data\.held_out 6 of 6 samples leaves nothing"):
        run(path, settings(tmp_path / "out"), held_out=6)
    with pytest.raises(ValueError, match=r"stands under data\.sources and under data\.held_out"):
        run(path, settings(tmp_path / "out"), held_out=[LlavaSource(path=path)])


def test_what_is_held_out_is_a_number_or_sources(tmp_path: Path) -> None:
    def given(value: object) -> Any:
        return validate({"train": {"output_dir": str(tmp_path)}, "data": {"held_out": value}}, "here").data.held_out

    assert given(None) is None
    assert given(64) == 64
    assert given([{"format": "llava", "path": "a.json"}]) == [LlavaSource(path=Path("a.json"))]
    for wrong in (0, [{"format": "llava", "pth": "a.json"}], "many"):
        with pytest.raises(ValueError, match=r"data\.held_out"):
            given(wrong)


def test_resumed_run_asks_the_same_and_finds_the_same(llava_folder: Callable[..., Path], tmp_path: Path) -> None:
    path, config = llava_folder(12), settings(tmp_path / "out", save_every=2, eval_every=2)
    run(path, config, held_out=4)
    told = held_out(config.output_dir)
    shutil.rmtree(config.output_dir / "checkpoints" / "step-4")
    run(path, config, resume=True, held_out=4)
    assert held_out(config.output_dir) == told
