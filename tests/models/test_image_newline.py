"""Tiles laid out as images: token for token what transformers' LLaVA-NeXT makes of them, and learned like a weight."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.llava_next.modeling_llava_next import LlavaNextModel

from conftest import IMAGE_SIZE, VISUAL_TOKENS, make_image_processor, make_model, make_sample, make_tokenizer, picture
from mllm.any_resolution import AnyResolution
from mllm.data.collate import collate
from mllm.data.imaging.tiling import LLAVA_NEXT, Tiling
from mllm.data.packing import join
from mllm.data.processor import Processor
from mllm.models.build import ModelConfig, check_rows
from mllm.models.connectors import MLPConnector, QFormerConnector, ResamplerConnector
from mllm.models.image_newline import ImageNewline
from mllm.models.multimodal import MultimodalLM
from mllm.train.halving import split
from mllm.train.losses import NextToken, model_inputs
from test_any_resolution import LAYOUTS, sizes

CPU = torch.device("cpu")


def anyres_model(seed: int = 0) -> MultimodalLM:
    """The tests' model with a newline."""
    model, plain = make_model(seed=seed), AnyResolution(IMAGE_SIZE, 2, tuple(LLAVA_NEXT))
    torch.manual_seed(3)
    model.image_newline = ImageNewline(plain, 32)
    return model


def anyres_processor(**more: Any) -> Processor:
    return Processor(make_tokenizer(), make_image_processor(), VISUAL_TOKENS, tiles="anyres", **more)


def samples() -> list[Any]:
    """Words alone, one wide image, three images of three shapes, a tall one."""
    shapes = [[], [(90, 20)], [(30, 30), (31, 150), (200, 120)], [(20, 60)]]
    made = [make_sample(seed, num_images=len(own)) for seed, own in enumerate(shapes)]
    for sample, own in zip(made, shapes, strict=True):
        sample.images = [picture(number, size) for number, size in enumerate(own)]
    return made


def packed_by_transformers(newline: ImageNewline, tokens: Tensor, image_sizes: list[tuple[int, int]]) -> Tensor:
    """[N, V, D] -> [T, D], by the code of `LlavaNextForConditionalGeneration`."""
    layout = newline.layout
    pinpoints = [[rows * layout.side, columns * layout.side] for columns, rows in layout.grids]
    vision = SimpleNamespace(image_size=layout.side, patch_size=layout.side // layout.across)
    stock = SimpleNamespace(config=SimpleNamespace(vision_config=vision, image_grid_pinpoints=pinpoints))
    tiles = [layout.num_tiles(width, height) for height, width in image_sizes]
    images = tokens.split(tiles)
    pieces, _ = LlavaNextModel.pack_image_features(stock, images, image_sizes, "full", newline.weight)  # type: ignore[arg-type]
    return torch.cat(pieces)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: f"{layout.side}px-{layout.across}-{len(layout.grids)}")
def test_tokens_are_those_that_transformers_packs_and_as_many_as_planned(layout: AnyResolution) -> None:
    newline, width = ImageNewline(layout, 2), 2
    image_sizes = [(height, width) for width, height in sizes(1000 if layout.across < 3 else 40)]
    number = sum(layout.num_tiles(width, height) for height, width in image_sizes)
    tokens = torch.randn(number, layout.across**2, width, generator=torch.Generator().manual_seed(0))
    found = newline(tokens, image_sizes)
    assert len(found) == sum(layout.num_tokens(width, height) for height, width in image_sizes)
    assert torch.equal(found, packed_by_transformers(newline, tokens, image_sizes))


def test_planned_slots_are_the_features_of_images_through_processor_and_model() -> None:
    processor, model = anyres_processor(), anyres_model()
    for number, size in enumerate(sizes(40, 8)):
        sample = make_sample(number)
        sample.images = [picture(number, size)]
        if max(size) > 200 * min(size):
            continue
        example = processor(sample)
        features = model.visual_tokens(example.pixel_values, None, example.image_sizes)
        assert example.image_sizes == [size[::-1]]
        assert len(features) == example.input_ids.count(processor.image_token_id)


def test_packed_samples_of_any_shape_are_the_same_samples_alone() -> None:
    processor, model = anyres_processor(), anyres_model()
    examples = [processor(sample) for sample in samples()]
    shape = processor.pixel_shape
    together = collate([join(examples[:2], shape), join(examples[2:], shape)], shape)
    apart = [collate([join([example], shape)], shape) for example in examples]
    objective = NextToken(model)
    whole, parts = objective(**model_inputs(together, CPU)), [objective(**model_inputs(one, CPU)) for one in apart]
    torch.testing.assert_close(whole, sum(parts), rtol=1e-5, atol=1e-5)
    (gradient,) = torch.autograd.grad(whole, model.image_newline.weight)  # type: ignore[union-attr]
    (summed,) = torch.autograd.grad(sum(parts), model.image_newline.weight)  # type: ignore[union-attr]
    torch.testing.assert_close(gradient, summed, rtol=1e-4, atol=1e-6)
    assert gradient.abs().max() > 0
    halves = sum(objective(**model_inputs(part, CPU)) for part in split(together, 1))
    torch.testing.assert_close(halves, whole, rtol=1e-5, atol=1e-5)


def test_words_alone_give_the_newline_a_gradient_of_zero_and_not_none() -> None:
    """Else a rank without an image would hang the others."""
    processor, model = anyres_processor(), anyres_model()
    shape = processor.pixel_shape
    batch = collate([join([processor(samples()[0])], shape)], shape)
    assert batch["num_images"] == 0
    NextToken(model)(**model_inputs(batch, CPU)).backward()
    gradient = model.image_newline.weight.grad  # type: ignore[union-attr]
    assert gradient is not None
    assert not gradient.any()


def test_sizes_that_mean_other_tiles_are_refused() -> None:
    with pytest.raises(ValueError, match=r"5 tiles, but images of \[\(60, 20\)\] \(height, width\) have \[4\]"):
        anyres_model().image_newline(torch.zeros(5, 4, 32), [(60, 20)])  # type: ignore[misc]


@pytest.mark.parametrize("connector", [QFormerConnector(), ResamplerConnector()])
def test_connectors_whose_tokens_have_no_place_in_the_picture_are_refused(connector: Any) -> None:
    with pytest.raises(ValueError, match=rf"anyres with a {connector.type} connector.*dynamic"):
        check_rows(ModelConfig("encoder", "llm", connector))
    check_rows(ModelConfig("encoder", "llm", MLPConnector()))


def test_visual_tokens_that_fill_no_square_are_refused() -> None:
    with pytest.raises(ValueError, match="3 visual tokens a tile: laid out in rows they must fill a square"):
        Tiling("anyres", 28).any_resolution(3)
