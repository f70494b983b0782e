"""One wrapper for the families of encoders: how many patches, which tokens are dropped, where the tap lies."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    SiglipVisionConfig,
    SiglipVisionModel,
    ViTConfig,
    ViTModel,
)

from mllm.models.vision_encoder import VisionEncoder, final_norm, layer_list
from mllm.models.vision_grid import grid
from mllm.types import Normalisation

SIZES = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
WIDE = {**SIZES, "intermediate_size": 48}
PREFIX = {"clip": 1, "siglip": 0, "vit": 1, "dinov2": 1, "dinov2_registers": 1 + 4}
FAMILIES: dict[str, Callable[[], torch.nn.Module]] = {
    "clip": lambda: CLIPVisionModel(CLIPVisionConfig(**WIDE)),
    "siglip": lambda: SiglipVisionModel(SiglipVisionConfig(**WIDE)),
    "vit": lambda: ViTModel(ViTConfig(**WIDE)),
    "dinov2": lambda: Dinov2Model(Dinov2Config(**SIZES)),
    "dinov2_registers": lambda: Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**SIZES, num_register_tokens=4)),
}
each = pytest.mark.parametrize("family", FAMILIES)


def make(family: str) -> torch.nn.Module:
    torch.manual_seed(0)
    model = FAMILIES[family]().eval()
    return getattr(model, "vision_model", model)


def pixels(images: int = 2) -> torch.Tensor:
    return torch.randn(images, 3, 28, 28, generator=torch.Generator().manual_seed(3))


def states_by_hooks(model: torch.nn.Module) -> list[torch.Tensor]:
    """What each layer of the whole model says, the last one before any norm."""
    kept: list[torch.Tensor] = []
    for layer in layer_list(model):
        layer.register_forward_hook(lambda _m, _i, out: kept.append(out if torch.is_tensor(out) else out[0]))
    with torch.no_grad():
        model(pixel_values=pixels())
    return kept


@each
def test_features_are_one_a_patch_without_class_or_register_tokens(family: str) -> None:
    encoder = VisionEncoder(make(family))
    assert encoder.num_patches == grid(encoder.model.config).num_patches == 4
    assert encoder(pixels()).shape == (2, 4, encoder.width)


@each
@pytest.mark.parametrize("layer", [-2, 1, 2, -3])
def test_tap_equals_the_hidden_state_of_the_whole_model(family: str, layer: int) -> None:
    with torch.no_grad():
        states = make(family)(pixel_values=pixels(), output_hidden_states=True).hidden_states
        tapped = VisionEncoder(make(family), layer)(pixels())
    torch.testing.assert_close(tapped, states[layer][:, PREFIX[family] :], rtol=0, atol=1e-6)


@each
@pytest.mark.parametrize("layer", [-1, 3])
def test_last_layer_is_tapped_before_the_final_norm(family: str, layer: int) -> None:
    with torch.no_grad():
        tapped = VisionEncoder(make(family), layer)(pixels())
    torch.testing.assert_close(tapped, states_by_hooks(make(family))[-1][:, PREFIX[family] :], rtol=0, atol=1e-6)


@each
def test_features_behind_the_norm_are_what_the_whole_model_says_last(family: str) -> None:
    """CLIP's own norm sees the class token alone: of its patches the last hidden state has none."""
    encoder = VisionEncoder(make(family), -1, feature_norm=True).requires_grad_(False)
    with torch.no_grad():
        last = make(family)(pixel_values=pixels()).last_hidden_state[:, PREFIX[family] :]
    if family == "clip":
        last = make(family).post_layernorm(last)
    assert torch.equal(encoder(pixels()), last)
    assert not torch.allclose(encoder(pixels()), VisionEncoder(make(family), -1)(pixels()), atol=1e-2)


@each
def test_several_layers_go_through_the_norm_each(family: str) -> None:
    norm = final_norm(make(family))
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(5)))
    model = make(family)
    final_norm(model).load_state_dict(norm.state_dict())
    several = VisionEncoder(model, [1, -1], feature_norm=True).requires_grad_(False)(pixels())
    alone = [norm(VisionEncoder(make(family), layer).requires_grad_(False)(pixels())) for layer in (1, -1)]
    torch.testing.assert_close(several, torch.cat(alone, dim=-1), rtol=0, atol=1e-6)


@each
def test_trained_encoder_behind_its_norm_trains_the_norm_too(family: str) -> None:
    encoder = VisionEncoder(make(family), -2, feature_norm=True).requires_grad_(True)
    encoder.freeze_behind_tap()
    encoder(pixels()).square().sum().backward()
    assert [name for name, p in encoder.named_parameters() if p.requires_grad and p.grad is None] == []
    assert all(p.requires_grad for p in final_norm(encoder.model).parameters())


def test_encoder_without_a_known_final_norm_is_refused_in_words() -> None:
    model = make("vit")
    model.last = model.layernorm
    del model.layernorm
    with pytest.raises(ValueError, match=r"no final norm that is known here: set model\.feature_norm to false"):
        VisionEncoder(model, feature_norm=True)


@each
def test_layers_behind_the_tap_are_cut_off(family: str) -> None:
    encoder = VisionEncoder(make(family), 1)
    assert sum(isinstance(m, torch.nn.ModuleList) and len(m) == 1 for m in encoder.modules()) == 1


@each
@pytest.mark.parametrize("layer", [0, 4, -4, 99, -99])
def test_layer_out_of_range_is_refused_with_the_range(family: str, layer: int) -> None:
    with pytest.raises(ValueError, match=rf"feature_layer {layer} .*3 layers"):
        VisionEncoder(make(family), layer)


def test_frozen_encoder_gives_features_without_a_graph() -> None:
    encoder = VisionEncoder(make("clip")).requires_grad_(False)
    assert not encoder(pixels().requires_grad_()).requires_grad


@each
def test_trained_encoder_gives_every_trained_weight_a_gradient(family: str) -> None:
    """A weight behind the tap never gets a gradient, and DDP refuses to go on with such weights."""
    encoder = VisionEncoder(make(family)).requires_grad_(True)
    encoder.freeze_behind_tap()
    encoder(pixels()).square().sum().backward()
    assert [name for name, p in encoder.named_parameters() if p.requires_grad and p.grad is None] == []
    assert sum(p.requires_grad for p in encoder.parameters()) > 10


def test_half_precision_encoder_takes_float_pixels() -> None:
    assert VisionEncoder(make("clip").bfloat16())(pixels()).dtype == torch.bfloat16


def test_other_image_size_than_the_configs_is_a_users_mistake_in_words() -> None:
    """DINOv2 takes any size: its hub config says 518 pixels, its image processor makes 224."""
    with pytest.raises(ValueError, match=r"28.*42|42.*28"):
        VisionEncoder(make("dinov2"))(torch.zeros(1, 3, 42, 42))


NORMALISATION = Normalisation(1 / 255, (0.48, 0.46, 0.41), (0.27, 0.26, 0.28))


def raw_pixels(images: int = 2) -> torch.Tensor:
    return torch.randint(0, 256, (images, 3, 28, 28), generator=torch.Generator().manual_seed(3)).to(torch.uint8)


@each
def test_bytes_are_normalised_before_the_encoder_and_floats_are_taken_as_normalised(family: str) -> None:
    encoder = VisionEncoder(make(family), normalisation=NORMALISATION).requires_grad_(False)
    mean, std = (torch.tensor(values)[:, None, None] for values in (NORMALISATION.mean, NORMALISATION.std))
    by_hand = (raw_pixels() / 255 - mean) / std
    torch.testing.assert_close(encoder(raw_pixels()), encoder(by_hand), rtol=0, atol=1e-5)
    assert torch.equal(encoder(by_hand), VisionEncoder(make(family)).requires_grad_(False)(by_hand))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_normalisation_stays_in_float32_whatever_the_encoder_is_cast_to(dtype: torch.dtype) -> None:
    """Buffers would be cast with it: a mean of 0.4815 becomes 0.4824."""
    encoder = VisionEncoder(make("clip"), normalisation=NORMALISATION)
    before = encoder.normalised(raw_pixels())
    after = encoder.to(dtype).normalised(raw_pixels())
    assert after.dtype == torch.float32
    assert torch.equal(before, after)


def test_normalisation_is_no_part_of_the_weights() -> None:
    assert VisionEncoder(make("clip"), normalisation=NORMALISATION).state_dict().keys() == (
        VisionEncoder(make("clip")).state_dict().keys()
    )


def test_bytes_for_an_encoder_without_an_image_processor_are_refused_in_words() -> None:
    with pytest.raises(ValueError, match=r"preprocessor_config\.json"):
        VisionEncoder(make("clip"))(raw_pixels())


def test_two_forwards_do_not_share_features() -> None:
    encoder = VisionEncoder(make("clip"))
    first = encoder(pixels())
    assert not torch.equal(first, encoder(pixels() + 1))
    assert torch.equal(first, encoder(pixels()))
