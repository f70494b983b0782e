"""uint8 for the device: with the normalisation that is left, the image processor's own result, by the cheapest way."""

from __future__ import annotations

import pickle
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    BitImageProcessor,
    BlipImageProcessor,
    CLIPImageProcessor,
    ConvNextImageProcessor,
    DeiTImageProcessor,
    EfficientNetImageProcessor,
    LevitImageProcessor,
    PixtralImageProcessor,
    SiglipImageProcessor,
    ViTImageProcessor,
)

from conftest import picture
from mllm.data.imaging.pixels import Resize, cheapest_way, least_side, whole
from mllm.types import Normalisation

SMALL = {"height": 30, "width": 30}
CLIP = CLIPImageProcessor(size={"shortest_edge": 30}, crop_size=SMALL)
STOCK = {
    "clip": CLIP,
    "clip_cut_harder": CLIPImageProcessor(size={"shortest_edge": 41}, crop_size={"height": 30, "width": 28}),
    "siglip": SiglipImageProcessor(size=SMALL),
    "siglip_wide": SiglipImageProcessor(size={"height": 20, "width": 50}),
    "vit": ViTImageProcessor(size=SMALL),
    "dinov2": BitImageProcessor(size={"shortest_edge": 34}, crop_size=SMALL),
    "deit": DeiTImageProcessor(size={"height": 34, "width": 34}, crop_size=SMALL),
    "blip": BlipImageProcessor(size=SMALL),
}
PECULIAR = {
    "crops_beyond_the_edge": CLIPImageProcessor(size={"shortest_edge": 20}, crop_size=SMALL),
    "convnext": ConvNextImageProcessor(size={"shortest_edge": 30}),
    "levit": LevitImageProcessor(size={"shortest_edge": 30}, crop_size=SMALL),
    "no_normalise": CLIPImageProcessor(size={"shortest_edge": 30}, crop_size=SMALL, do_normalize=False),
    "no_rescale": CLIPImageProcessor(size={"shortest_edge": 30}, crop_size=SMALL, do_rescale=False),
    "own_scale": SiglipImageProcessor(size=SMALL, rescale_factor=1 / 127.5, image_mean=[1.0] * 3, image_std=[1.0] * 3),
}
UNSPLIT = {"efficientnet": EfficientNetImageProcessor(size=SMALL, crop_size=SMALL, rescale_offset=True)}
SIZES = [(64, 48), (48, 64), (31, 31), (30, 30), (7, 9), (1, 1), (200, 3), (3, 200), (301, 299)]


def normalised(image_processor: Any, image: Image.Image) -> torch.Tensor:
    """By our way and the device's arithmetic."""
    way, normalisation, _ = cheapest_way(image_processor)
    return normalisation(way(image)) if normalisation else way(image)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", [*STOCK, *PECULIAR, *UNSPLIT])
def test_normalised_on_the_device_equals_the_image_processors_own(name: str, size: tuple[int, int]) -> None:
    image_processor = {**STOCK, **PECULIAR, **UNSPLIT}[name]
    own = whole(image_processor, picture(1, size))
    torch.testing.assert_close(normalised(image_processor, picture(1, size)), own.float(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", STOCK)
def test_the_usual_image_processors_go_straight_through_pillow(name: str) -> None:
    way, normalisation, shape = cheapest_way(STOCK[name])
    assert isinstance(way, Resize)
    assert normalisation == Normalisation.of(STOCK[name])
    assert way(picture(1)).shape == (1, *shape)
    assert way(picture(1)).dtype == torch.uint8


@pytest.mark.parametrize("name", PECULIAR)
def test_peculiar_ones_still_give_bytes(name: str) -> None:
    way, normalisation, _ = cheapest_way(PECULIAR[name])
    assert way(picture(1)).dtype == torch.uint8
    assert normalisation is not None


def test_other_arithmetic_than_scale_mean_and_std_stays_float() -> None:
    way, normalisation, _ = cheapest_way(UNSPLIT["efficientnet"])
    assert way(picture(1)).dtype == torch.float32
    assert normalisation is None


def test_one_that_does_not_know_the_words_stays_float() -> None:
    class Plain:
        def __call__(self, images: list[Image.Image], return_tensors: str) -> dict[str, Any]:
            return CLIP(images=images, return_tensors=return_tensors)

    way, normalisation, shape = cheapest_way(Plain())
    assert (way(picture(1)).dtype, normalisation, shape) == (torch.float32, None, (3, 30, 30))


def test_one_that_only_says_it_resizes_is_not_believed() -> None:
    """Settings like CLIP's, and a step more: the bytes on noise tell."""

    class Flipping(type(CLIP)):  # type: ignore[misc]
        def center_crop(self, image: np.ndarray, *arguments: Any, **options: Any) -> np.ndarray:
            return super().center_crop(image, *arguments, **options)[..., ::-1].copy()

    flipping = Flipping(size={"shortest_edge": 30}, crop_size=SMALL)
    assert not isinstance(cheapest_way(flipping)[0], Resize)
    torch.testing.assert_close(normalised(flipping, picture(1)), whole(flipping, picture(1)), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("broken", [PixtralImageProcessor(), lambda images, return_tensors: {"patches": 1}])
def test_pixels_of_no_fixed_size_are_refused_when_the_processor_is_built(broken: Any) -> None:
    with pytest.raises(ValueError, match=r"makes .* of .*image.* another encoder"):
        cheapest_way(broken)


@pytest.mark.parametrize("name", [*STOCK, "convnext", "efficientnet"])
def test_ways_travel_to_workers(name: str) -> None:
    way, _, _ = cheapest_way({**STOCK, **PECULIAR, **UNSPLIT}[name])
    assert torch.equal(pickle.loads(pickle.dumps(way))(picture(1)), way(picture(1)))


def test_least_side_is_what_the_image_processor_asks_for_before_it_crops() -> None:
    assert least_side(STOCK["clip_cut_harder"], (3, 30, 28)) == 41
    assert least_side(STOCK["siglip_wide"], (3, 20, 50)) == 50
    assert least_side(object(), (3, 30, 28)) == 30


def test_normalising_leaves_the_bytes_as_they_are() -> None:
    pixels = torch.full((2, 3, 4, 4), 7, dtype=torch.uint8)
    assert Normalisation.of(CLIP)(pixels).dtype == torch.float32
    assert (pixels == 7).all()
