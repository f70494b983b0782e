"""The Q-Former's own stage: masks, the three losses against plain computations, one rank and two."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy, normalize

from conftest import make_model, make_processor
from mllm.data.formats.captions import CaptionsSource
from mllm.data.index import build_index
from mllm.data.loader import DataConfig
from mllm.models.connectors import QFormerConnector
from mllm.models.multimodal import MultimodalLM
from mllm.train.blip2 import objective as objective_room
from mllm.train.blip2.contrast import contrast, hard_negatives, similarities
from mllm.train.blip2.objective import READS, WRITES, Blip2
from mllm.train.blip2.same_image import digests
from mllm.train.blip2.text_side import attach, embedded, mask_of, take_off, through_blocks
from mllm.train.loop import fit
from mllm.train.losses import model_inputs
from mllm.train.route import deal, make_plan
from mllm.train.settings import TrainConfig
from mllm.train.trainable import LearningRates, choose_trainable
from runs import metrics, on_two_ranks, start_engine, weights

QUERIES, LENGTH = 5, 64
SIZES: dict[str, Any] = {"num_queries": QUERIES, "hidden_size": 32, "num_layers": 2, "num_heads": 2}
NAMES = ("red", "green", "blue", "white")


def made(instruct: bool = False, seed: int = 0) -> MultimodalLM:
    """A tiny model whose Q-Former has its text side; cross-attention in every block."""
    model = make_model(connector=QFormerConnector(**SIZES, cross_attention_every=1, instruct=instruct), seed=seed)
    torch.manual_seed(seed + 7)
    for layer in model.connector.blocks.modules():
        if isinstance(layer, torch.nn.Linear):
            layer.weight.data *= 6  # drawn for a width of 768
    attach(model.connector, 32)
    choose_trainable(model, LearningRates(connector=1e-2), None)
    model.connector.to_llm.requires_grad_(False)
    return model


def drawn(folder: Path, number: int, seed: int = 0) -> Path:
    """Pictures of one colour under noise, each with its colour as caption."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    records = []
    for row in range(number):
        name = NAMES[row % len(NAMES)]
        noise = torch.randint(-40, 40, (28, 28, 3), generator=torch.Generator().manual_seed(1000 * seed + row))
        plain = torch.tensor(Image.new("RGB", (1, 1), name).getpixel((0, 0)))
        picture = Image.fromarray((plain + noise).clamp(0, 255).to(torch.uint8).numpy())
        picture.save(folder / "images" / f"{row}.png")
        records.append({"image": f"images/{row}.png", "caption": f"a {name} square"})
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, records)))
    return folder / "data.jsonl"


def settings(folder: Path, **changes: Any) -> TrainConfig:
    plain: dict[str, Any] = {"learning_rate": LearningRates(connector=3e-3), "steps": 4, "rows_per_step": 8}
    more = {"rows_per_micro_batch": 4, "loss_reduction": "sample", "probe": False, "warmup": 0.1}
    return TrainConfig(output_dir=folder, **{**plain, **more, **changes})


def run(data: Path, train: TrainConfig, resume: bool = False, accelerator: Accelerator | None = None) -> MultimodalLM:
    model, processor = made(), make_processor(QUERIES, keep=True)
    config = DataConfig([CaptionsSource(path=data)], seq_length=LENGTH, packing=False, num_workers=0)
    index = build_index(config.sources, processor, LENGTH, progress=False)
    train.output_dir.mkdir(parents=True, exist_ok=True)
    plan = make_plan(index, config, train, resume)
    fit(accelerator or Accelerator(cpu=True), model, processor, index, plan, config, train, resume, learns=Blip2)
    return model


def one_batch(data: Path, rows: int = 8) -> dict[str, Any]:
    """The first micro-batch of a run, as the objective gets it."""
    processor, train = make_processor(QUERIES), settings(data.parent / "none", rows_per_micro_batch=rows)
    config = DataConfig([CaptionsSource(path=data)], seq_length=LENGTH, packing=False, num_workers=0)
    index = build_index(config.sources, processor, LENGTH, progress=False)
    plan = make_plan(index, config, train)
    batches = deal(Accelerator(cpu=True), index, plan, processor, train)
    return model_inputs(batches[next(iter(batches.items(0, 1)))], torch.device("cpu"))


# ---------------------------------------------------------------- who sees whom


@pytest.mark.parametrize("instruct", [False, True])
def test_queries_never_see_the_text_that_is_written_and_words_see_no_later_ones(instruct: bool) -> None:
    connector = made(instruct).connector.eval()
    features, words, is_text = torch.randn(2, 4, 24), torch.randn(2, 6, 32), torch.ones(2, 7, dtype=torch.bool)
    changed = words.clone()
    changed[:, 3] += 1.0
    mask = mask_of(is_text, QUERIES, writes=True)
    queries, text = through_blocks(connector, embedded(connector, words, WRITES), mask, features)
    other_queries, other_text = through_blocks(connector, embedded(connector, changed, WRITES), mask, features)
    assert torch.equal(queries, other_queries)
    assert torch.equal(text[:, :4], other_text[:, :4])  # the start and three words
    assert (text[:, 4:] - other_text[:, 4:]).abs().amin(dim=(0, 2)).gt(0).all()


def test_text_that_is_written_sees_the_image() -> None:
    connector, words, is_text = made().connector.eval(), torch.randn(1, 3, 32), torch.ones(1, 4, dtype=torch.bool)
    mask = mask_of(is_text, QUERIES, writes=True)
    text = [through_blocks(connector, embedded(connector, words, WRITES), mask, torch.randn(1, 4, 24))[1] for _ in "ab"]
    assert (text[0] - text[1]).abs().max() > 1e-5  # weights are drawn small


def test_queries_and_text_see_each_other_where_pairs_are_matched_and_nobody_sees_padding() -> None:
    connector, features = made().connector.eval(), torch.randn(1, 4, 24)
    words, is_text = torch.randn(1, 6, 32), torch.tensor([[True] * 5 + [False] * 2])
    mask = mask_of(is_text, QUERIES, writes=False)
    queries, text = through_blocks(connector, embedded(connector, words, READS), mask, features)
    last, pad = words.clone(), words.clone()
    last[:, 3], pad[:, 4] = last[:, 3] + 1.0, pad[:, 4] + 1.0
    seen_queries, seen_text = through_blocks(connector, embedded(connector, last, READS), mask, features)
    assert (queries - seen_queries).abs().amin(dim=2).gt(0).all()
    assert (text[:, 0] - seen_text[:, 0]).abs().max() > 1e-5  # weights are drawn small; the first sees the last
    same_queries, same_text = through_blocks(connector, embedded(connector, pad, READS), mask, features)
    assert torch.equal(queries, same_queries)
    assert torch.equal(text[:, :5], same_text[:, :5])


def test_features_that_are_contrasted_are_of_the_image_alone_and_of_the_text_alone(tmp_path: Path) -> None:
    objective = Blip2(made()).eval()
    features, ids = torch.randn(2, 4, 24), torch.randint(3, 300, (2, 6))
    words, is_word = objective.words(ids), torch.ones(2, 6, dtype=torch.bool)
    queries, _ = objective.generated(features, words, is_word)
    connector = objective.model.connector
    alone = connector.blocks(
        query_embeds=connector.queries.expand(2, -1, -1), encoder_hidden_states=connector.feature_norm(features)
    ).last_hidden_state
    torch.testing.assert_close(queries, alone)
    padded = torch.cat([words, torch.randn(2, 3, 32)], dim=1)
    is_padded = torch.cat([is_word, torch.zeros(2, 3, dtype=torch.bool)], dim=1)
    torch.testing.assert_close(objective.read(words, is_word), objective.read(padded, is_padded))


# ---------------------------------------------------------------- the losses


def test_contrast_is_the_smoothed_cross_entropy_over_the_best_query() -> None:
    torch.manual_seed(0)
    queries, texts = normalize(torch.randn(6, 3, 8), dim=-1), normalize(torch.randn(6, 8), dim=-1)
    plain = torch.tensor([[max(float(q @ t) for q in row) for t in texts] for row in queries])
    logits = similarities(queries, texts) / 0.07
    torch.testing.assert_close(logits, plain / 0.07)
    found = contrast(logits, torch.eye(6, dtype=torch.bool), torch.ones(6, dtype=torch.bool))
    expected = cross_entropy(plain / 0.07, torch.arange(6), label_smoothing=0.1, reduction="none")
    torch.testing.assert_close(found, expected)


def test_equal_texts_share_the_target_and_rows_that_do_not_count_are_in_no_sum() -> None:
    logits, counts = torch.randn(4, 4), torch.tensor([True, True, True, False])
    same = torch.eye(4, dtype=torch.bool)
    same[0, 2] = same[2, 0] = True
    found = contrast(logits, same, counts)
    log_p = logits[0, :3].log_softmax(0)
    torch.testing.assert_close(found[0], -(torch.tensor([0.45, 0.0, 0.45]) + 0.1 / 3) @ log_p)
    assert torch.isfinite(found).all()


def test_hard_negative_is_never_the_own_text_nor_an_equal_one_and_the_likest_most_often() -> None:
    logits = torch.tensor([[9.0, 2.0, 9.0, 0.0, 5.0]]).repeat(2000, 1)
    same, counts = torch.tensor([[True, False, True, False, False]]).repeat(2000, 1), torch.tensor([True] * 4 + [False])
    noise = torch.rand(2000, 5, generator=torch.Generator().manual_seed(0))
    chosen, found = hard_negatives(logits, same, counts, noise)
    assert found.all()
    assert set(chosen.tolist()) == {1, 3}
    share = (chosen == 1).float().mean()
    assert share == pytest.approx(float(torch.tensor([2.0, 0.0]).softmax(0)[0]), abs=0.02)
    assert not hard_negatives(logits, torch.ones_like(same), counts, noise)[1].any()


def two_captions(folder: Path, pictures: int) -> Path:
    """Each picture in two rows that lie apart, with another caption in each: no two rows say the same."""
    data = drawn(folder, pictures)
    records = [json.loads(line) for line in data.read_text().splitlines()]
    rows = [{**record, "caption": f"{way} {number}"} for way in ("one", "two") for number, record in enumerate(records)]
    data.write_text("\n".join(map(json.dumps, rows)))
    return data


def test_captions_of_one_image_share_the_target_and_are_never_negatives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch, told = one_batch(two_captions(tmp_path, 4)), []
    monkeypatch.setattr(objective_room, "contrast", lambda logits, same, counts: told.append(same) or logits.sum(1))
    monkeypatch.setattr(
        objective_room, "hard_negatives", lambda *given: told.append(given[1]) or hard_negatives(*given)
    )
    objective = Blip2(made())
    objective(**batch)
    pixels = batch["pixel_values"].flatten(1)
    expected = (pixels[:, None] == pixels[None]).all(dim=2)  # [8, 8]
    assert (expected.sum(1) == 2).all(), "each picture stands in two rows"
    captions = [tuple(labels[labels != -100].tolist()) for labels in batch["labels"]]
    assert len(set(captions)) == 8
    assert len(told) == 4
    assert all(torch.equal(same, expected) for same in told)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.bfloat16])
def test_digest_of_an_image_changes_with_any_number_and_with_their_order(dtype: torch.dtype) -> None:
    image = torch.randint(0, 255, (3, 28, 28), generator=torch.Generator().manual_seed(0)).to(dtype)
    images = [image, image.clone(), image.flip(2), image.transpose(1, 2)]
    for place in ((0, 0, 0), (1, 13, 5), (2, 27, 27)):
        images.append(image.clone())
        images[-1][place] = 255
    found = digests(torch.stack(images)).tolist()
    assert found[0] == found[1]
    assert len(set(found)) == len(images) - 1


def test_generation_loss_is_that_of_each_caption_read_word_by_word(tmp_path: Path) -> None:
    objective, batch = Blip2(made()).eval(), one_batch(drawn(tmp_path, 8))
    summed, losses = objective(**batch, each=True)
    features, _ = objective.features(batch["input_ids"], batch["pixel_values"], batch["num_images"])
    model, expected, mean = objective.model, [], 0.0
    for row, labels in enumerate(batch["labels"]):
        caption = labels[labels != -100]
        own = []
        for said in range(len(caption)):  # what was said so far, alone: nothing later is there to be seen
            text = embedded(model.connector, objective.words(caption[None, :said]), WRITES)
            mask = mask_of(torch.ones(1, said + 1, dtype=torch.bool), QUERIES, writes=True)
            state = through_blocks(model.connector, text, mask, features[row : row + 1])[1][:, -1]
            own.append(cross_entropy(model.logits(objective.side.to_words(state)), caption[said : said + 1]))
        expected += own
        mean += torch.stack(own).mean().item()
    torch.testing.assert_close(losses, torch.stack(expected).detach(), rtol=1e-4, atol=1e-5)
    assert summed.item() == pytest.approx(mean, rel=1e-4)


def test_every_weight_that_trains_has_a_gradient_and_nothing_of_the_llm_runs(tmp_path: Path) -> None:
    for instruct in (False, True):
        model = made(instruct)
        model.llm.get_decoder().forward = None  # would raise
        Blip2(model)(**one_batch(drawn(tmp_path, 8))).backward()
        missing = [n for n, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
        # a key's bias adds the same to all logits of a softmax
        assert [name for name in missing if not name.endswith("key.bias")] == []


def test_rows_without_a_pair_change_nothing_and_words_without_an_image_are_refused(tmp_path: Path) -> None:
    batch = one_batch(drawn(tmp_path, 8), rows=4)
    hole = {name: batch[name] for name in batch}
    for name, fill in (("input_ids", 0), ("labels", -100), ("position_ids", 0)):
        hole[name] = torch.cat([batch[name], torch.full_like(batch[name][:1], fill)])
    objective = Blip2(made()).eval()
    assert torch.equal(objective(**batch), objective(**hole))
    objective.train()
    sums = []
    for given in (batch, hole):
        torch.manual_seed(0)
        objective(**given)
        sums.append(objective.summed[-1])
    torch.testing.assert_close(sums[0][[0, 2, 3]], sums[1][[0, 2, 3]])  # other noise draws other negatives for ITM
    wrong = {**hole, "labels": hole["labels"].clone()}
    wrong["labels"][-1, 3] = 5
    with pytest.raises(ValueError, match="words without an image"):
        objective(**wrong)


# ---------------------------------------------------------------- runs


def test_training_lowers_all_three_losses_and_pictures_that_it_never_saw_find_their_text(tmp_path: Path) -> None:
    data = drawn(tmp_path, 48)
    rows = {"rows_per_step": 16, "rows_per_micro_batch": 16}
    train = settings(tmp_path / "run", steps=100, learning_rate=LearningRates(connector=5e-3), log_every=100, **rows)
    model = run(data, train)
    told = torch.tensor(metrics(train.output_dir, "itc", "itm", "itg"))
    assert (told[-5:].mean(0) < 0.7 * told[:3].mean(0)).all(), told[[0, -1]]
    assert "mfu" not in json.loads((train.output_dir / "metrics.jsonl").read_text().splitlines()[0])

    batch, objective = one_batch(drawn(tmp_path / "new", 24, seed=1), rows=8), Blip2(model).eval()
    features, _ = objective.features(batch["input_ids"], batch["pixel_values"], batch["num_images"])
    captions = [labels[labels != -100].tolist() for labels in batch["labels"]]
    texts = [list(text) for text in dict.fromkeys(map(tuple, captions))]
    ids = torch.tensor([text + [-1] * (16 - len(text)) for text in texts])
    said = objective.read(objective.words(ids), ids >= 0)
    start = torch.zeros(len(features), 1, 32)
    seen, _ = objective.generated(features, start, torch.ones(len(features), 1, dtype=torch.bool))
    side = objective.side
    found = similarities(normalize(side.of_query(seen), dim=-1), normalize(side.of_text(said), dim=-1)).argmax(1)
    right = sum(texts[number] == caption for number, caption in zip(found.tolist(), captions, strict=True))
    assert len(texts) == 4
    assert right / len(captions) >= 0.75


def as_one_of_two(rank: int, data: Path, folder: Path) -> None:
    two = settings(folder / "two", rows_per_micro_batch=2, save_every=4)
    run(data, two, accelerator=start_engine("ddp"))
    torch.distributed.destroy_process_group()


def test_two_ranks_of_two_rows_learn_what_one_of_four_does(tmp_path: Path) -> None:
    data = two_captions(tmp_path, 8)
    run(data, settings(tmp_path / "one", save_every=4))
    on_two_ranks(as_one_of_two, data, tmp_path)
    one, two = tmp_path / "one", tmp_path / "two"
    for ours, theirs in zip(
        *(metrics(run, "loss", "itc", "itm", "itg", "grad_norm") for run in (one, two)), strict=True
    ):
        assert theirs == pytest.approx(ours, rel=1e-4)
    expected, found = (load_file(run / "checkpoints" / "step-4" / "trained.safetensors") for run in (one, two))
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        if name.endswith("key.bias"):
            continue  # its gradient is rounding alone (it adds the same to all logits), which AdamW makes steps of
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=2e-5, msg=lambda m, name=name: f"{name}: {m}")


def test_run_that_was_cut_off_goes_on_with_the_same_losses(tmp_path: Path) -> None:
    data = drawn(tmp_path, 16)
    whole = run(data, settings(tmp_path / "whole", save_every=2))
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut" / "checkpoints" / "step-4")
    resumed = run(data, settings(tmp_path / "cut", save_every=2), resume=True)
    names = ("loss", "itc", "itm", "itg")
    assert metrics(tmp_path / "cut", *names) == metrics(tmp_path / "whole", *names)
    expected = weights(whole)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights(resumed).items())
    assert any(".text_side." in name for name in expected)


@pytest.mark.parametrize("instruct", [False, True])
def test_text_side_taken_off_leaves_the_connector_that_the_config_builds(instruct: bool) -> None:
    model = made(instruct)
    before = make_model(connector=QFormerConnector(**SIZES, cross_attention_every=1, instruct=instruct)).connector
    taken = take_off(model.connector)
    assert [name for name, _ in model.connector.named_parameters()] == [name for name, _ in before.named_parameters()]
    assert {name.split(".")[0] for name in taken} == {"blocks", "text_side"}
    model.connector(torch.randn(2, 4, 24))
