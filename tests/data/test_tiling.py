"""Images as tiles: how many is known from a size alone, and which is what LLaVA-NeXT and InternVL make of it."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

from conftest import IMAGE_SIZE, VISUAL_TOKENS, make_image_processor, make_model, make_sample, make_tokenizer, picture
from indexing import index_of
from mllm.data.collate import collate
from mllm.data.held_out import HeldOutBatches
from mllm.data.imaging.tiling import Tiling
from mllm.data.indexing.measure import Sizes, measure
from mllm.data.loader import DataConfig, Share
from mllm.data.packing import join
from mllm.data.processor import Processor
from mllm.models.image_newline import ImageNewline
from mllm.models.splice import one_sequence
from mllm.train.halving import split
from mllm.types import Sample

POLICIES = [("anyres", None), ("anyres", 6), ("dynamic", None), ("dynamic", 4)]


def tiled(policy: str, most: int | None = None, **more: Any) -> Processor:
    processor = make_image_processor()
    return Processor(make_tokenizer(), processor, VISUAL_TOKENS, tiles=policy, max_tiles=most, **more)  # type: ignore[arg-type]


def sizes(count: int) -> list[tuple[int, int]]:
    draw = random.Random(0)
    return [(round(2 ** draw.uniform(2, 8)), round(2 ** draw.uniform(2, 8))) for _ in range(count)]


@pytest.mark.parametrize(("policy", "most"), POLICIES)
def test_planned_tokens_are_the_features_of_a_thousand_sizes(policy: str, most: int | None) -> None:
    processor, model = tiled(policy, most), make_model()
    if processor.slots.any_resolution:
        model.image_newline = ImageNewline(processor.slots.any_resolution, 32)
    fewest, highest = processor.slots.tile_range
    for width, height in sizes(1000):
        image = Image.new("RGB", (width, height))
        tiles = processor.slots.taken(image).tiles
        assert fewest <= tiles <= highest
        assert processor.pixels([image]).shape == (tiles, 3, IMAGE_SIZE, IMAGE_SIZE)
    for seed, size in enumerate(sizes(20)):
        sample = make_sample(seed)
        sample.images = [picture(seed, size)]
        example = processor(sample)
        features = one_sequence(model.visual_tokens(example.pixel_values, None, example.image_sizes))
        assert len(features) == example.input_ids.count(processor.image_token_id)


@pytest.mark.parametrize("size", [(60, 20), (20, 60), (100, 90), (31, 150), (400, 99), (28, 28), (7, 9)])
def test_anyres_is_what_llava_next_makes(size: tuple[int, int]) -> None:
    side = IMAGE_SIZE
    pinpoints = [[side, 2 * side], [2 * side, side], [2 * side, 2 * side], [3 * side, side], [side, 3 * side]]
    stock = LlavaNextImageProcessorPil(
        size={"shortest_edge": side}, crop_size={"height": side, "width": side}, image_grid_pinpoints=pinpoints
    )
    image, processor = picture(3, size), tiled("anyres")
    wanted = torch.as_tensor(np.asarray(stock(images=[image], return_tensors="np")["pixel_values"][0]))
    torch.testing.assert_close(processor.normalisation(processor.pixels([image])), wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize("size", [(60, 20), (20, 60), (100, 90), (31, 150), (400, 99), (28, 28), (7, 9)])
@pytest.mark.parametrize("most", [4, 12])
def test_dynamic_is_what_internvl_makes(size: tuple[int, int], most: int) -> None:
    stock = GotOcr2ImageProcessorPil(
        size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}, crop_to_patches=True, min_patches=1, max_patches=most
    )
    image, processor = picture(3, size), tiled("dynamic", most)
    wanted = torch.as_tensor(np.asarray(stock(images=[image], return_tensors="np")["pixel_values"]))
    torch.testing.assert_close(processor.normalisation(processor.pixels([image])), wanted, rtol=0, atol=2e-2)


@pytest.mark.parametrize(("policy", "most"), POLICIES[::2])
def test_the_index_tells_lengths_and_tiles_of_turned_and_drafted_photographs(
    policy: str, most: int | None, tmp_path: Path
) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    samples = []
    for number, size in enumerate(sizes(6)):
        picture(number, size).save(tmp_path / f"{number}.jpg", exif=exif)
        sample = make_sample(number)
        sample.images = [tmp_path / f"{number}.jpg"]
        samples.append(sample)
    for draft in (False, True):
        processor = tiled(policy, most, jpeg_draft=draft)
        for sample, (height, width) in zip(samples, sizes(6), strict=True):
            line, example = measure(sample, processor, 400, Sizes()), processor(sample, 400)
            assert line["sizes"] == [width, height]
            assert (line["length"], line["tiles"]) == (len(example.input_ids), len(example.pixel_values))
            assert processor.slots.tiling
            assert line["tiles"] == processor.slots.tiling.number(width, height)


def test_a_tiled_image_that_does_not_fit_is_cut_away_whole() -> None:
    processor = tiled("anyres")
    sample = make_sample(1, num_images=2, turns=2)
    sample.messages[2].content.insert(0, sample.messages[0].content.pop(0))
    whole = processor.encoded(sample)
    first, slots = processor.slots.taken(sample.images[0])
    start = whole.input_ids.index(processor.image_token_id, whole.input_ids.index(processor.image_token_id) + slots)
    for length in (start + 4, len(whole.input_ids) - 30):
        kept = processor.encoded(sample, length)
        assert (len(kept.input_ids), kept.images, kept.tiles) == (start, 1, first)
        assert len(processor(sample, length).pixel_values) == first


def test_an_unreadable_image_is_an_image_fault_also_where_its_tiles_are_counted() -> None:
    sample = make_sample(1)
    sample.images = [Path("nowhere.png")]
    assert measure(sample, tiled("dynamic"), 400, Sizes())["kind"] == "image"


def test_a_row_that_is_split_keeps_its_tiles_and_its_losses() -> None:
    processor, model = tiled("dynamic", 4), make_model()
    samples = [make_sample(seed) for seed in range(4)]
    for sample, size in zip(samples, [(60, 20), (20, 60), (30, 30), (90, 80)], strict=True):
        sample.images = [picture(1, size)]
    shape = processor.pixel_shape
    batch = collate([join([processor(sample)], shape) for sample in samples], shape)
    assert batch["num_images"] == sum(batch["row_images"]) > 4
    whole = model(batch["input_ids"], batch["position_ids"], batch["pixel_values"], batch["num_images"])
    for row, part in enumerate(split(batch, 1)):
        length = part["input_ids"].shape[1]
        alone = model(part["input_ids"], part["position_ids"], part["pixel_values"], part["num_images"])
        torch.testing.assert_close(alone[0], whole[row, :length], rtol=1e-4, atol=1e-5)


def test_instructions_are_told_to_each_tile() -> None:
    example = tiled("anyres", instruct=True)(make_sample(1, num_images=2))
    assert len(example.instructions) == len(example.pixel_values) > 2
    assert len(set(map(tuple, example.instructions))) == 1


def test_saved_tiles_and_markers_are_loaded(tmp_path: Path) -> None:
    processor = tiled("dynamic", 5, image_markers="numbered")
    processor.save(tmp_path)
    loaded = Processor.load(tmp_path)
    sample = make_sample(1, num_images=2)
    assert (loaded.slots.tiling, loaded.image_markers) == (processor.slots.tiling, "numbered")
    assert loaded(sample).input_ids == processor(sample).input_ids


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"max_tiles": 4}, "without data.tiles"),
        ({"tiles": "anyres", "image_fit": "pad"}, "tiles fit by themselves"),
        ({"tiles": "anyres", "max_tiles": 1}, "smallest grid has 2"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        Processor(make_tokenizer(), make_image_processor(), VISUAL_TOKENS, **settings)


def test_held_out_samples_borrow_as_many_tiles(llava_folder: Any) -> None:
    path = llava_folder(8)
    for row, size in enumerate([(60, 20), (60, 20), (20, 60), (30, 30), (60, 20), (30, 30), (90, 80), (20, 60)]):
        picture(row, size).save(path.parent / "images" / f"{row}.png")
    processor = tiled("dynamic", 4)
    index = index_of(path, processor)
    assert index.tiles.tolist() == [processor.slots.taken(index.sample(n).images[0]).tiles for n in range(8)]
    batches = HeldOutBatches(index, processor, DataConfig(seq_length=256), Share(0, 1, 2))
    for rows in batches.items:
        asked = batches[rows]
        assert asked.borrowed.shape == asked.batch["pixel_values"].shape
        assert not asked.batch["faults"]
    assert batches.num_changed >= 6


def test_crop_and_resize_make_squares_of_all_and_of_the_middle() -> None:
    image = Image.new("RGB", (90, 30), (255, 0, 0))
    image.paste((0, 0, 255), (30, 0, 60, 30))
    seen = {}
    for fit in ("crop", "resize"):
        processor = Processor(make_tokenizer(), make_image_processor(), 4, image_fit=fit)  # type: ignore[arg-type]
        seen[fit] = processor.pixels([image])
        assert seen[fit].shape == (1, *processor.pixel_shape)
    assert (seen["crop"][0, 2] > 250).all()
    assert (seen["resize"][0, 2] == 255).float().mean() < 0.4


def test_the_range_of_tiles_is_reached() -> None:
    for policy, most in POLICIES:
        tiling = Tiling(policy, IMAGE_SIZE, most)  # type: ignore[arg-type]
        counts = {tiling.number(*size) for size in sizes(3000)}
        assert (min(counts), max(counts)) == tiling.range()


def test_a_sample_without_an_image_has_no_tiles() -> None:
    processor = tiled("anyres")
    sample = Sample("s", make_sample(1, num_images=0).messages)
    assert processor.encoded(sample).tiles == 0
    assert processor(sample).pixel_values.shape == (0, *processor.pixel_shape)
