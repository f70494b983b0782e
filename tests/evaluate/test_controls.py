from pathlib import Path

import pytest
from PIL import Image

from mllm.evaluate.controls import MID_GREY, blank_images, shuffle_images
from mllm.types import Mark, Message, Sample


def sample(name: str, *images: str | Path) -> Sample:
    marks: list[str | Mark] = [Mark.IMAGE] * len(images)
    return Sample(name, [Message("user", [*marks, "what?"]), Message("assistant", ["this"])], list(images))


SHARED = [sample(f"{picture}{number}", f"{picture}.png") for number in range(4) for picture in "abcde"]


@pytest.mark.parametrize("seed", range(20))
def test_shuffled_samples_never_keep_their_own_picture(seed: int) -> None:
    shuffled = shuffle_images(SHARED, seed)
    assert [new.id for new in shuffled] == [old.id for old in SHARED]
    assert all(new.images != old.images for new, old in zip(shuffled, SHARED, strict=True))
    assert {new.images[0] for new in shuffled} == {f"{picture}.png" for picture in "abcde"}


def test_one_picture_written_as_text_and_as_path_is_one_picture() -> None:
    with pytest.raises(ValueError, match=r"a\.png"):
        shuffle_images([sample("1", "a.png"), sample("2", Path("./a.png"))], seed=0)


def test_the_same_seed_gives_the_same_pictures_and_another_seed_others() -> None:
    images = [[s.images for s in shuffle_images(SHARED, seed)] for seed in (1, 1, 2)]
    assert images[0] == images[1] != images[2]


def test_samples_trade_only_with_those_that_have_as_many_images() -> None:
    samples = [sample("0"), sample("1", "a"), sample("2", "b"), sample("3", "a", "b"), sample("4", "c", "d")]
    assert [s.images for s in shuffle_images(samples, 0)] == [[], ["b"], ["a"], ["c", "d"], ["a", "b"]]


def test_shuffling_leaves_the_samples_it_was_given_alone() -> None:
    before = [list(s.images) for s in SHARED]
    shuffle_images(SHARED, 0)
    assert [s.images for s in SHARED] == before


def test_a_blank_image_is_grey_and_as_large_as_the_original(tmp_path: Path) -> None:
    Image.new("RGB", (30, 20), "red").save(tmp_path / "red.png")
    (blank,) = blank_images([sample("1", tmp_path / "red.png")])
    assert isinstance(blank.images[0], Image.Image)
    assert blank.images[0].size == (30, 20)
    assert blank.images[0].getcolors() == [(600, MID_GREY)]
