"""Real data by other people loads through its format, as many samples as its README counts."""

from __future__ import annotations

from pathlib import Path

import pytest

from mllm.data.formats.auto import AutoSource
from mllm.data.formats.fields import FieldsSource
from mllm.data.images import image_size, open_image
from shared_data import shared


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLLM_CACHE", str(tmp_path / "cache"))


def test_flags_are_250_captions() -> None:
    samples = list(AutoSource(path=shared("flags") / "captions.jsonl").read())
    assert len(samples) == 250
    assert all(open_image(sample.images[0]).width == 224 for sample in samples[::50])


def test_emoji_are_1026_names() -> None:
    path = shared("fxemoji") / "captions.jsonl"
    source = FieldsSource(path=path, image="{image}", answer="{unicode_name}")
    found = list(source.scan(0))
    assert len([sample for _, sample in found if 64 in image_size(sample.images[0])]) == 1026
    assert source.fetch(found[-1][0]) == found[-1][1]


def test_nlvr_is_989_statements_about_images_in_a_zip() -> None:
    folder = shared("nlvr-dev")
    source = FieldsSource(
        path=folder / "dev.json",
        image_dir=folder / "dev-images.zip",
        image="dev/images/{directory}/dev-{identifier}-0.png",
        prompt="{sentence} True or false?",
        answer="{label}",
    )
    samples = list(source.read())
    assert [sum(s.messages[1].text == word for s in samples) for word in ("true", "false")] == [547, 442]
    assert all(open_image(sample.images[0]).size == (400, 100) for sample in samples[::100])


def test_coco_train_sample_is_400_captions_of_80_images() -> None:
    folder = shared("coco-train-sample")
    samples = list(AutoSource(path=folder / "captions_80images.json", image_dir=folder / "images").read())
    assert (len(samples), len({sample.images[0] for sample in samples})) == (400, 80)
    assert all(Path(str(sample.images[0])).is_file() for sample in samples)


def test_real_shards_are_read_and_those_without_captions_told() -> None:
    folder = shared("webdataset-shards") / "webdataset"
    with pytest.raises(ValueError, match=r"sample\.tgz is of no known format: .* __key__, cls, png, image"):
        list(AutoSource(path=folder / "sample.tgz").read())
    digits = list(FieldsSource(path=folder / "sample.tgz", image="{png}", prompt="?", answer="{cls}").read())
    assert len(digits) == 90
    assert {open_image(sample.images[0]).size for sample in digits} == {(28, 28)}
    assert len(list(FieldsSource(path=folder / "testgz.tar", answer="{txt}").read())) == 1000
