"""One door from sample to tokens and pixels: V slots an image, labels on words alone, nothing cut through an image."""

from __future__ import annotations

import pickle
from dataclasses import FrozenInstanceError, replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import EfficientNetImageProcessor

from conftest import make_processor, make_sample, make_tokenizer, picture
from mllm.data.imaging.slots import ImageFit
from mllm.data.imaging.transform import LARGEST_SIDE
from mllm.data.indexing.measure import Sizes, measure
from mllm.data.processor import Processor
from mllm.types import IGNORE_INDEX, Mark, Message, Sample


@pytest.mark.parametrize("slots", [1, 4, 9])
@pytest.mark.parametrize("images", [0, 1, 3])
def test_each_placeholder_becomes_v_slots(slots: int, images: int) -> None:
    processor = make_processor(slots)
    example = processor(make_sample(1, num_images=images))
    assert example.input_ids.count(processor.image_token_id) == slots * images
    assert example.pixel_values.shape == (images, *processor.pixel_shape)
    assert len(example.labels) == len(example.input_ids)


def test_slots_stand_where_the_marks_stand(processor: Processor) -> None:
    messages = [Message("user", ["a", Mark.IMAGE, "b", Mark.IMAGE]), Message("assistant", ["c"])]
    example = processor(Sample("s", messages, [picture(1), picture(2)]))
    text = processor.tokenizer.decode(example.input_ids)
    assert text == f"<|user|>a{'<image>' * 4}b{'<image>' * 4}<|end|><|assistant|>c<|end|>"
    assert torch.equal(example.pixel_values[1:], processor.pixels([picture(2)]))


def test_expansion_leaves_the_labels_words_as_they_are(processor: Processor) -> None:
    example = processor(make_sample(1, num_images=2, turns=2))
    said = [label for label in example.labels if label != IGNORE_INDEX]
    assert processor.tokenizer.decode(said) == "answer 7 <|end|>answer 8 <|end|>"


def test_labels_are_never_on_placeholders(processor: Processor) -> None:
    messages = [Message("user", ["draw"]), Message("assistant", ["here ", Mark.IMAGE, " it is"])]
    example = processor(Sample("s", messages, [picture(1)]))
    spoken = [label for label in example.labels if label != IGNORE_INDEX]
    assert processor.image_token_id not in spoken
    assert processor.tokenizer.decode(spoken) == "here  it is<|end|>"


@pytest.mark.parametrize(
    ("text", "marks", "images"),
    [("", 1, 0), ("", 1, 2), ("", 0, 1), ("<image>", 0, 0), ("<image>", 1, 1)],
)
def test_placeholders_and_images_must_be_equal(processor: Processor, text: str, marks: int, images: int) -> None:
    messages = [Message("user", [*[Mark.IMAGE] * marks, f"what? {text}"]), Message("assistant", ["red"])]
    sample = Sample("s", messages, [picture(i) for i in range(images)], where="data.json, row 7")
    for door in (processor, processor.prompt, processor.encode):
        with pytest.raises(ValueError, match=rf"^data\.json, row 7: .*{images} images must be equal"):
            door(sample)


def test_an_unreadable_image_is_named(processor: Processor) -> None:
    sample = make_sample(1)
    sample.images = [Path("nowhere.png")]
    with pytest.raises(ValueError, match=r"cannot read image nowhere\.png: no such file"):
        processor(sample)


def test_a_folder_in_the_place_of_an_image_is_named_as_one(processor: Processor, tmp_path: Path) -> None:
    sample = make_sample(1)
    sample.images = [tmp_path]
    with pytest.raises(ValueError, match="no such file, but a folder"):
        processor(sample)


@pytest.mark.parametrize("length", range(20, 60))
def test_a_cut_keeps_the_first_tokens_or_tells_why_not(processor: Processor, length: int) -> None:
    sample = make_sample(1, num_images=2, turns=2, extra="and more")
    whole = processor(sample)
    try:
        example = processor(sample, max_length=length)
    except ValueError as error:
        assert str(error).startswith("made.json, row 1: ")  # noqa: PT017
        assert "raise data.seq_length" in str(error)  # noqa: PT017
        return
    kept = len(example.input_ids)
    assert kept == min(length, len(whole.input_ids)) or whole.input_ids[kept] == processor.image_token_id
    assert (example.input_ids, example.labels) == (whole.input_ids[:kept], whole.labels[:kept])
    shown = example.input_ids.count(processor.image_token_id)
    assert shown % 4 == 0
    assert torch.equal(example.pixel_values, whole.pixel_values[: shown // 4])
    assert any(label != IGNORE_INDEX for label in example.labels[1:])


@pytest.mark.parametrize(("length", "told"), [(3, "would cut an image"), (12, "leave nothing to learn")])
def test_a_cut_through_an_image_or_before_the_answer_is_refused(length: int, told: str) -> None:
    with pytest.raises(ValueError, match=rf"^made\.json, row 1: .* {told}"):
        make_processor()(make_sample(1), max_length=length)


def test_a_cut_goes_in_front_of_an_image_that_does_not_fit() -> None:
    messages = [Message("assistant", ["red"]), Message("user", [Mark.IMAGE, "x"])]
    processor = make_processor()
    sample = Sample("s", messages, [picture(1)])
    last = max(i for i, token in enumerate(processor(sample).input_ids) if token == processor.image_token_id)
    assert len(processor(sample, max_length=last + 1).input_ids) == last + 1
    for length in range(last - 3, last + 1):
        example = processor(sample, max_length=length)
        assert len(example.input_ids) == last - 3
        assert len(example.pixel_values) == 0
    with pytest.raises(ValueError, match="would cut an image, and in front of it is nothing to learn"):
        processor(Sample("s", [messages[1], messages[0]], [picture(1)]), max_length=4)


def test_images_behind_a_cut_are_neither_opened_nor_counted(tmp_path: Path) -> None:
    picture(1).save(tmp_path / "0.png")
    content = ["red", Mark.IMAGE, "green", Mark.IMAGE, "blue", Mark.IMAGE, "end"]
    document = Sample("d", [Message("user", []), Message("assistant", content)], where="row 1")
    document.images = [tmp_path / "0.png", tmp_path / "missing.png", tmp_path / "missing.png"]
    for instruct in (False, True):
        processor = make_processor(instruct=instruct)
        whole = processor.encoded(document)
        second = [i for i, token in enumerate(whole.input_ids) if token == processor.image_token_id][4]
        for length in range(second + 1, second + 4):
            kept = processor.encoded(document, length)
            assert (kept.images, len(kept.input_ids), kept.cut) == (1, second, len(whole.input_ids) - second)
            example = processor(document, length)
            assert torch.equal(example.pixel_values, processor.pixels(document.images[:1]))
            assert len(example.instructions) == instruct
            line = measure(document, processor, length, Sizes())
            assert (line.get("cause"), line["length"], line["sizes"]) == (None, second, [32, 32])
        assert measure(document, processor, second + 4, Sizes())["kind"] == "image"


def test_a_prompt_has_no_labels_and_begins_the_training_ids(processor: Processor) -> None:
    sample = make_sample(3, num_images=2)
    question = Sample("q", sample.messages[:-1], sample.images)
    prompt, example = processor.prompt(question), processor(sample)
    assert set(prompt.labels) == {IGNORE_INDEX}
    assert example.input_ids[: len(prompt.input_ids)] == prompt.input_ids
    assert example.labels[len(prompt.input_ids)] != IGNORE_INDEX
    assert torch.equal(prompt.pixel_values, example.pixel_values)


@pytest.mark.parametrize(("fit", "draft"), [("native", False), ("pad", False), ("native", True)])
@pytest.mark.parametrize("template", ["conftest", None])
def test_saved_and_loaded_processors_are_the_same(
    tmp_path: Path, fit: ImageFit, draft: bool, template: str | None
) -> None:
    settings = {"image_fit": fit, "jpeg_draft": draft}
    processor = make_processor(7, **settings) if template else make_processor(7, None, **settings)
    processor.save(tmp_path)
    loaded = Processor.load(tmp_path)
    sample = make_sample(5, num_images=2, turns=2)
    sample.images[0] = picture(8, (50, 20))
    before, after = processor(sample), loaded(sample)
    assert (before.input_ids, before.labels) == (after.input_ids, after.labels)
    assert torch.equal(before.pixel_values, after.pixel_values)
    assert (loaded.image_token_id, loaded.image_fit) == (processor.image_token_id, fit)
    assert (loaded.jpeg_draft, loaded.normalisation) == (draft, processor.normalisation)


def test_a_processor_saved_before_there_was_a_draft_is_read(tmp_path: Path) -> None:
    make_processor(7).save(tmp_path)
    (tmp_path / "mllm_processor.json").write_text('{"num_visual_tokens": 7, "image_fit": "pad"}')
    loaded = Processor.load(tmp_path)
    assert (loaded.num_visual_tokens, loaded.image_fit, loaded.jpeg_draft) == (7, "pad", False)


def test_pixels_are_bytes_that_the_encoder_normalises_with_or_without_images(processor: Processor) -> None:
    for images in (0, 2):
        pixels = processor(make_sample(1, num_images=images)).pixel_values
        assert (pixels.dtype, pixels.shape) == (torch.uint8, (images, *processor.pixel_shape))
    own = processor.image_processor(images=[picture(1)], return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(processor.normalisation(processor.pixels([picture(1)])), own, rtol=0, atol=1e-6)


def test_pixels_that_cannot_be_split_are_float_with_or_without_images() -> None:
    side = {"height": 28, "width": 28}
    peculiar = EfficientNetImageProcessor(size=side, crop_size=side, rescale_offset=True)
    processor = Processor(make_tokenizer(), peculiar, 4)
    assert processor.normalisation is None
    assert processor.pixels([]).dtype == processor.pixels([picture(1)]).dtype == torch.float32


@pytest.mark.parametrize("fit", ["native", "pad"])
def test_draft_is_close_to_the_whole_decode_and_off_by_default(tmp_path: Path, fit: ImageFit) -> None:
    smooth = picture(1, (8, 6)).resize((800, 600), Image.Resampling.BICUBIC)
    smooth.save(tmp_path / "a.jpg", quality=95)
    plain, drafting = make_processor(image_fit=fit), make_processor(image_fit=fit, jpeg_draft=True)
    whole, draft = plain.pixels([tmp_path / "a.jpg"]), drafting.pixels([tmp_path / "a.jpg"])
    assert not make_processor().jpeg_draft
    assert not torch.equal(whole, draft)
    assert (whole.int() - draft.int()).abs().float().mean() < 4  # of 255; the most where `pad` rounds its border


@pytest.mark.parametrize("size", [(60, 20), (20, 60), (21, 20), (30, 30)])
def test_pad_shows_the_whole_image_on_the_mean_colour(size: tuple[int, int]) -> None:
    image = picture(1, size)
    fitted = make_processor(image_fit="pad").transform.fit(image)
    left, top = (fitted.width - size[0]) // 2, (fitted.height - size[1]) // 2
    assert fitted.size == (max(size),) * 2
    assert fitted.crop((left, top, left + size[0], top + size[1])).tobytes() == image.tobytes()
    if fitted.size != size:
        assert fitted.getpixel((fitted.width - 1, fitted.height - 1)) == (
            122,
            116,
            104,
        )  # as stock LlavaImageProcessor has it


def test_pad_does_not_blow_a_long_image_up_to_its_square() -> None:
    processor = make_processor(image_fit="pad")
    assert processor.transform.fit(Image.new("RGB", (30_000, 200))).size == (LARGEST_SIDE, LARGEST_SIDE)


@pytest.mark.parametrize("size", [(1, 1), (1, 100), (3, 100), (100, 3), (3, 3)])
def test_tiny_images_keep_their_channels(processor: Processor, size: tuple[int, int]) -> None:
    thin, square = (processor.pixels([Image.new("RGB", each, (255, 0, 0))]) for each in (size, (28, 28)))
    assert torch.equal(thin, square)


def test_kept_samples_are_the_same_tokens_and_pixels(tmp_path: Path) -> None:
    samples = []
    for i in range(3):
        picture(i).save(tmp_path / f"{i}.png")
        sample = make_sample(i)
        sample.images = [tmp_path / f"{i}.png"]
        samples.append(sample)
    fresh, keeping = make_processor(), make_processor(keep=True)
    for _ in range(2):
        for sample in samples:
            one, other = keeping(sample), fresh(sample)
            assert (one.input_ids, one.labels) == (other.input_ids, other.labels)
            assert torch.equal(one.pixel_values, other.pixel_values)
    assert len(keeping.kept_tokens) == len(keeping.kept_pixels) == 3
    assert not fresh.kept_tokens


def test_a_processor_is_a_value_and_another_one_follows_its_settings_whole() -> None:
    native, wide = make_processor(), picture(1, (60, 20))
    with pytest.raises(FrozenInstanceError):
        native.image_fit = "pad"  # type: ignore[misc]
    assert native.slots.tile_range == (1, 1)
    for settings in ({"image_fit": "pad"}, {"tiles": "dynamic", "max_tiles": 4}, {"tiles": "anyres"}):
        changed, made = replace(native, **settings), make_processor(**settings)
        assert changed.slots == made.slots
        assert torch.equal(changed.pixels([wide]), made.pixels([wide]))
        assert not torch.equal(changed.pixels([wide])[:1], native.pixels([wide]))
        again = pickle.loads(pickle.dumps(changed))
        assert torch.equal(again.pixels([wide]), made.pixels([wide]))
        assert again.slots.taken(wide) == made.slots.taken(wide)
