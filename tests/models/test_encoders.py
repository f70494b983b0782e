"""Encoders by id: folders in the Hub's format, a tiny one of each family, alone and side by side."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModel

from conftest import make_sample, picture
from mllm.config import validate
from mllm.data.processor import Processor
from mllm.generate import Assistant
from mllm.models.build import ModelConfig, build_encoder, build_model, load_vision_model, visual_tokens_per_image
from mllm.models.feature_cache import FeatureCache
from mllm.models.fused_encoder import FusedEncoder, resized
from mllm.models.vision_encoder import VisionEncoder
from mllm.models.vision_grid import Grid
from mllm.train.stage_folder import load_stage, save_stage
from mllm.train.trainable import LearningRates, choose_trainable
from mllm.train.tuning.adapters import Lora
from mllm.types import Normalisation, Sample
from models.encoder_families import DEPTH, IMAGE_PROCESSORS, IMAGENET, MODELS, PREFIX, SIDE, WIDTH, save_encoder

each = pytest.mark.parametrize("family", PREFIX)


@pytest.fixture(scope="module")
def encoders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder a family, whole checkpoints where the family has a text half."""
    folder = tmp_path_factory.mktemp("encoders")
    for number, (family, make) in enumerate(MODELS.items()):
        torch.manual_seed(number)
        save_encoder(make(), family, folder / family)
    return folder


def config(encoders: Path, *families: str, hub: Path | None = None, **more: object) -> ModelConfig:
    names = [str(encoders / family) for family in families]
    return ModelConfig(names if len(names) > 1 else names[0], str(hub / "llm") if hub else "none", **more)


def frozen(encoders: Path, *families: str, **more: object) -> VisionEncoder | FusedEncoder:
    return build_encoder(config(encoders, *families, **more)).requires_grad_(False)


def picked(encoders: Path, hub: Path, *families: str) -> Processor:
    chosen = config(encoders, *families, hub=hub)
    return Processor.from_hub(chosen.llm, chosen.encoders()[0], visual_tokens_per_image(chosen))


def stock_state(encoders: Path, family: str, image: Image.Image, layer: int) -> torch.Tensor:
    """What the family's own image processor and model make of a picture, class and register tokens among it."""
    whole = AutoModel.from_pretrained(encoders / family)
    own = AutoImageProcessor.from_pretrained(encoders / family)(images=[image], return_tensors="pt")
    with torch.no_grad():
        made = getattr(whole, "vision_model", whole)(**own, output_hidden_states=True)
    return made.hidden_states[layer]


@each
def test_folder_alone_says_how_many_visual_tokens_the_encoder_makes(encoders: Path, hub: Path, family: str) -> None:
    chosen = config(encoders, family, hub=hub)
    encoder = frozen(encoders, family)
    assert (encoder.grid.side, encoder.num_prefix_tokens) == (SIDE[family], PREFIX[family])
    pixels = picked(encoders, hub, family).pixels([picture(1, (50, 40)), picture(2)])
    assert encoder(pixels).shape == (2, visual_tokens_per_image(chosen), encoder.width)


@pytest.mark.parametrize("family", IMAGE_PROCESSORS)
@pytest.mark.parametrize("layer", [-2, 2])
def test_features_of_a_picture_are_those_of_the_stock_model_and_its_image_processor(
    encoders: Path, hub: Path, family: str, layer: int
) -> None:
    """On a square picture, of which NaFlex's own image processor makes a square grid."""
    image, encoder = picture(3, (60, 60)), frozen(encoders, family, feature_layer=layer)
    wanted = stock_state(encoders, family, image, layer)[:, PREFIX[family] :]
    features = encoder(picked(encoders, hub, family).pixels([image]))
    torch.testing.assert_close(features, wanted, rtol=0, atol=2e-5)


def test_dinov3_needs_no_torchvision(encoders: Path, hub: Path) -> None:
    processor = picked(encoders, hub, "dinov3")
    image = picture(3, (60, 50))
    by_hand = torch.from_numpy(np.array(image.resize((42, 42), 2))).permute(2, 0, 1)[None]
    assert torch.equal(processor.pixels([image]), by_hand)
    assert processor.normalisation == Normalisation(
        1 / 255, tuple(IMAGENET["image_mean"]), tuple(IMAGENET["image_std"])
    )
    states = AutoModel.from_pretrained(encoders / "dinov3").requires_grad_(False)
    encoder = frozen(encoders, "dinov3")
    wanted = states(encoder.normalised(by_hand), output_hidden_states=True).hidden_states[-2][:, 5:]
    torch.testing.assert_close(encoder(by_hand), wanted, rtol=0, atol=1e-5)


def test_pictures_that_are_not_square_become_squares_for_naflex(encoders: Path, hub: Path) -> None:
    processor = picked(encoders, hub, "naflex")
    assert processor.pixels([picture(1, (90, 30))]).shape == (1, 3, 28, 28)
    assert processor.num_visual_tokens == 4


@each
def test_other_number_of_tokens_than_promised_is_refused_with_the_numbers(encoders: Path, family: str) -> None:
    """Off by one is the classic: a class token taken for a patch, or a patch for the class token."""
    encoder = frozen(encoders, family)
    patches = encoder.num_patches
    encoder.num_prefix_tokens += 1
    said = rf"makes {patches + PREFIX[family]} tokens .* expected {PREFIX[family] + 1} before .* {patches} patches"
    with pytest.raises(ValueError, match=said):
        encoder(torch.zeros(1, 3, encoder.grid.side, encoder.grid.side))


@pytest.mark.parametrize("family", ["clip", "naflex", "dinov2_registers"])
@pytest.mark.parametrize("layers", [[-2, -1], [-1, 1], [2, 1, -1]], ids=str)
def test_features_of_several_layers_stand_side_by_side_in_the_order_of_the_list(
    encoders: Path, family: str, layers: list[int]
) -> None:
    side = SIDE[family]
    pixels = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(1))
    several = frozen(encoders, family, feature_layer=layers)
    alone = [frozen(encoders, family, feature_layer=layer)(pixels) for layer in layers]
    assert several.width == len(layers) * WIDTH
    torch.testing.assert_close(several(pixels), torch.cat(alone, dim=-1), rtol=0, atol=1e-6)


def test_layers_behind_the_last_of_several_taps_are_cut_off(encoders: Path) -> None:
    encoder = frozen(encoders, "vit", feature_layer=[2, 1])
    assert [len(m) for m in encoder.modules() if isinstance(m, torch.nn.ModuleList)] == [2]


@pytest.mark.parametrize(("layers", "said"), [([], "empty list"), ([-2, 9], "feature_layer 9 .*4 layers")])
def test_list_of_layers_that_is_empty_or_out_of_range_is_refused(encoders: Path, layers: list[int], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        frozen(encoders, "vit", feature_layer=layers)


PAIRS = [("siglip", "dinov2"), ("clip", "dinov2_registers"), ("siglip", "dinov3"), ("siglip", "naflex")]


@pytest.mark.parametrize("pair", PAIRS, ids="+".join)
def test_fused_features_are_those_of_each_encoder_on_its_own_view(
    encoders: Path, hub: Path, pair: tuple[str, str]
) -> None:
    """Sizes, means and deviations differ: each gets its own, of the same picture."""
    fused = frozen(encoders, *pair)
    pixels = picked(encoders, hub, *pair).pixels([picture(1, (50, 40)), picture(2)])
    first, second = fused(pixels).split(WIDTH, dim=-1)
    assert torch.equal(first, frozen(encoders, pair[0])(pixels))
    across = int(first.shape[1] ** 0.5)
    model = load_vision_model(config(encoders, pair[1]), str(encoders / pair[1]))
    alone = VisionEncoder(model, -2, frozen(encoders, pair[1]).normalisation, Grid(across * 14, 14))
    assert torch.equal(second, alone.requires_grad_(False)(resized(pixels, across * 14)))
    assert fused.width == 2 * WIDTH
    assert fused.encoders[0].normalisation != fused.encoders[1].normalisation or pair == ("siglip", "naflex")


def test_resized_pixels_are_pillows_bicubic_within_a_level() -> None:
    image = picture(5, (48, 48)).resize((96, 96), Image.Resampling.BICUBIC)
    wanted = torch.from_numpy(np.array(image.resize((42, 42), Image.Resampling.BICUBIC)))
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]
    assert resized(pixels, 96) is pixels
    assert (resized(pixels, 42)[0].permute(1, 2, 0).int() - wanted.int()).abs().max() <= 1


def test_encoders_of_fixed_size_with_other_grids_are_refused_with_both_grids(encoders: Path) -> None:
    said = r"2 x 2 patches of 14 in 28 pixels, but 3 x 3 patches of 14 in 42 pixels.*put the one of fixed size first"
    for build in (visual_tokens_per_image, build_encoder):
        with pytest.raises(ValueError, match=said):
            build(config(encoders, "dinov2", "siglip"))


def test_empty_list_of_encoders_is_refused() -> None:
    with pytest.raises(ValueError, match="empty list: name at least one encoder"):
        visual_tokens_per_image(ModelConfig([], "none"))


def test_missing_encoder_in_a_list_is_named(encoders: Path) -> None:
    with pytest.raises(ValueError, match=r"no vision encoder at '.*nowhere'"):
        visual_tokens_per_image(config(encoders, "clip", "nowhere"))


def test_pixels_that_are_normalised_for_one_encoder_are_refused_by_two(encoders: Path) -> None:
    with pytest.raises(ValueError, match="normalise differently: hand in uint8"):
        frozen(encoders, "siglip", "dinov2")(torch.zeros(1, 3, 42, 42))


def test_features_of_two_encoders_that_are_kept_are_those_that_are_computed(encoders: Path, hub: Path) -> None:
    fused, cache = frozen(encoders, "siglip", "dinov2"), FeatureCache(gigabytes=1)
    pixels = picked(encoders, hub, "siglip", "dinov2").pixels([picture(i) for i in range(3)])
    cache(fused, pixels[:2])
    torch.testing.assert_close(cache(fused, pixels), fused(pixels), rtol=0, atol=1e-6)
    assert len(cache.kept) == 3


@pytest.mark.parametrize("families", [("siglip",), ("siglip", "dinov2"), ("naflex",)], ids="+".join)
@pytest.mark.parametrize("layers", [-2, [1, -2]], ids=str)
def test_trained_encoders_give_every_trained_weight_a_gradient(
    encoders: Path, hub: Path, families: tuple[str, ...], layers: int | list[int]
) -> None:
    """A weight behind the taps never gets a gradient, and DDP refuses to go on with such weights."""
    encoder = build_encoder(config(encoders, *families, feature_layer=layers)).requires_grad_(True)
    pixels = picked(encoders, hub, *families).pixels([picture(1), picture(2)])
    encoder.freeze_behind_tap()
    encoder(pixels).square().sum().backward()
    assert [name for name, p in encoder.named_parameters() if p.requires_grad and p.grad is None] == []
    assert sum(p.requires_grad for p in encoder.parameters()) > 10 * len(families)


@pytest.mark.parametrize("families", [("siglip", "dinov2"), ("naflex",), ("dinov3",)], ids="+".join)
def test_stage_of_any_encoders_is_saved_reloaded_and_answers_the_same(
    encoders: Path, hub: Path, families: tuple[str, ...], tmp_path: Path
) -> None:
    chosen = config(encoders, *families, hub=hub, feature_layer=[-2, -1])
    processor = picked(encoders, hub, *families)
    torch.manual_seed(4)
    model = build_model(chosen, processor.image_token_id).requires_grad_(False)
    model.vision_encoder.requires_grad_(True)
    for parameter in model.vision_encoder.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    asked = make_sample(1, num_images=2)
    asked = Sample(asked.id, asked.messages[:-1], asked.images)
    before = Assistant(model, processor)
    yaml = json.dumps({"model": vars(chosen) | {"connector": {"type": "mlp"}}, "train": {"output_dir": str(tmp_path)}})
    save_stage(tmp_path, model, processor, yaml)
    after = Assistant.load(tmp_path, "cpu")
    inputs = [assistant.inputs([assistant.processor.prompt(asked)])["inputs_embeds"] for assistant in (before, after)]
    assert torch.equal(*inputs)
    pixels = processor.pixels([picture(1)])
    untrained = build_model(chosen, processor.image_token_id)
    assert not torch.equal(untrained.features(pixels), model.features(pixels))


def test_adapters_reach_the_layers_of_both_encoders_and_go_on_in_the_next_stage(
    encoders: Path, hub: Path, tmp_path: Path
) -> None:
    chosen, processor = config(encoders, "siglip", "dinov2", hub=hub), picked(encoders, hub, "siglip", "dinov2")
    model = build_model(chosen, processor.image_token_id)
    choose_trainable(model, LearningRates(vision_encoder=1e-3), None, Lora(rank=2))
    trained = {name: p for name, p in model.vision_encoder.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * 2 * (DEPTH - 1) * 6  # A and B of two encoders' layers in front of the tap
    for parameter in trained.values():
        parameter.data += 0.05
    pixels = processor.pixels([picture(1)])
    model.visual_tokens(pixels).square().sum().backward()
    assert all(parameter.grad is not None for parameter in trained.values())
    save_stage(tmp_path, model, processor, "")
    assert not (tmp_path / "vision_encoder.safetensors").exists()
    fresh = build_model(chosen, processor.image_token_id)
    before = fresh.visual_tokens(pixels)
    load_stage(fresh, tmp_path)
    torch.testing.assert_close(fresh.visual_tokens(pixels), model.visual_tokens(pixels), rtol=0, atol=1e-6)
    assert not torch.allclose(before, model.visual_tokens(pixels), atol=1e-3)


def test_layer_decay_over_two_encoders_is_refused_with_the_other_way(encoders: Path, hub: Path) -> None:
    model = build_model(config(encoders, "siglip", "dinov2", hub=hub), 384)
    with pytest.raises(ValueError, match=r"several encoders side by side: .*patterns"):
        choose_trainable(model, LearningRates(vision_encoder=1e-3, layer_decay={"vision_encoder": 0.5}), None)


def test_yaml_and_flags_take_one_name_or_a_list() -> None:
    raw = {"train": {"output_dir": "x"}, "model": {"vision_encoder": ["a", "b"], "llm": "c", "feature_layer": [-2, -5]}}
    parts = validate(raw, "a test").parts()
    assert (parts.encoders(), parts.feature_layer) == (["a", "b"], [-2, -5])
    raw["model"].update(vision_encoder="a", feature_layer=-1)
    parts = validate(raw, "a test").parts()
    assert (parts.encoders(), parts.feature_layer) == (["a"], -1)
