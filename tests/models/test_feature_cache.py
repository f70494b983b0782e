"""Features that are kept are those that the encoder gives, and no image is encoded twice."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mllm.models.feature_cache import FeatureCache

SIDE, PATCHES, WIDTH = 8, 4, 5
BYTES = PATCHES * WIDTH * 4
"""Of the features of one image."""


class Counting(nn.Module):
    """An encoder that remembers how many images it was shown, blank ones aside, and in which company."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = 0
        self.together: set[int] = set()
        self.weight = torch.randn(3 * SIDE * SIDE, PATCHES * WIDTH, generator=torch.Generator().manual_seed(0))

    def forward(self, pixel_values: Tensor) -> Tensor:
        self.seen += int(pixel_values.flatten(1).any(1).sum())
        self.together.add(len(pixel_values))
        return (pixel_values.float().flatten(1) @ self.weight).unflatten(1, (PATCHES, WIDTH))


def images(number: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (number, 3, SIDE, SIDE), dtype=torch.uint8, generator=generator)


def test_cached_features_equal_those_of_the_encoder_in_any_order() -> None:
    encoder, cache, shown = Counting(), FeatureCache(gigabytes=1), images(6)
    cache(encoder, shown[:4])
    order = torch.tensor([5, 0, 3, 3, 4, 1])
    torch.testing.assert_close(cache(encoder, shown[order]), Counting()(shown[order]), rtol=0, atol=1e-3)


def test_each_image_is_encoded_once() -> None:
    encoder, cache, shown = Counting(), FeatureCache(gigabytes=1), images(3)
    for _ in range(3):
        cache(encoder, torch.cat([shown, shown]))
    assert encoder.seen == 3


def test_images_that_differ_in_one_value_are_two_images() -> None:
    encoder, cache, shown = Counting(), FeatureCache(gigabytes=1), images(1).repeat(2, 1, 1, 1)
    shown[1, 2, 7, 7] ^= 1
    first, second = cache(encoder, shown)
    assert not torch.equal(first, second)


def test_what_does_not_fit_is_encoded_anew() -> None:
    encoder, cache, shown = Counting(), FeatureCache(gigabytes=2 * BYTES / 2**30), images(5)
    first = cache(encoder, shown)
    assert (encoder.seen, len(cache.kept)) == (5, 2)
    torch.testing.assert_close(cache(encoder, shown), first, rtol=0, atol=1e-3)
    assert encoder.seen == 5 + 3


def test_company_of_an_image_has_always_the_same_size() -> None:
    """A resumed run meets its images in other groups, and shall compute the same bits."""
    encoder, cache = Counting(), FeatureCache(gigabytes=0)
    for number in (1, 3, 8, 11):
        torch.testing.assert_close(cache(encoder, images(number)), Counting()(images(number)), rtol=1e-5, atol=1e-3)
    assert len(encoder.together) == 1
