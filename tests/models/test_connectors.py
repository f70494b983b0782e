"""The contract of a connector, asked of every member of the union: a new one is tested without a change here.

N images, P patches, V visual tokens, Dv and D widths of encoder and LLM.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import yaml
from pydantic import TypeAdapter
from safetensors.torch import load_file
from torch import Tensor, nn

from conftest import make_model, make_processor, make_sample
from mllm.config import Loader
from mllm.data.collate import collate
from mllm.data.packing import join
from mllm.models.connectors import (
    AvgPoolConnector,
    CAbstractorConnector,
    ConnectorConfig,
    MLPConnector,
    PixelShuffleConnector,
    QFormerConnector,
    ResamplerConnector,
)
from mllm.train.losses import NextToken, model_inputs
from mllm.train.stage_folder import load_whole, save_whole

SMALL = {"hidden_size": 16, "num_layers": 2, "num_heads": 2, "num_queries": 4, "tokens": 4}
"""For the members whose defaults are of real size; a field that a member does not have is left out."""
KINDS = get_args(get_args(ConnectorConfig)[0])
WIDTHS = [(24, 32), (13, 7), (5, 50)]


def small(kind: type, **changes: Any) -> Any:
    fields = kind.__dataclass_fields__
    return kind(**{name: value for name, value in {**SMALL, **changes}.items() if name in fields})


def built(kind: type, encoder_width: int = 24, llm_width: int = 32, patches: int = 4) -> nn.Module:
    torch.manual_seed(0)
    return small(kind).build(encoder_width, llm_width, patches)


def features(patches: int = 4, width: int = 24, images: int = 3) -> Tensor:
    return torch.randn(images, patches, width, generator=torch.Generator().manual_seed(1))


each = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__dataclass_fields__["type"].default)


@each
@pytest.mark.parametrize("patches", [4, 16, 64])
@pytest.mark.parametrize(("encoder_width", "llm_width"), WIDTHS)
def test_output_is_n_v_d_with_the_promised_v(kind: type, patches: int, encoder_width: int, llm_width: int) -> None:
    connector = built(kind, encoder_width, llm_width, patches)
    out = connector(features(patches, encoder_width))
    assert out.shape == (3, small(kind).num_tokens(patches), llm_width)
    assert torch.isfinite(out).all()


POOLING = [kind for kind in KINDS if hasattr(built(kind, patches=16), "pooled")]


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("kind", POOLING, ids=lambda kind: kind.__dataclass_fields__["type"].default)
def test_what_was_pooled_before_its_first_weight_gives_the_same_tokens_and_is_smaller(kind: type, bf16: bool) -> None:
    """Under autocast it is kept in half the bytes, since a product of bfloat16 follows."""
    model = make_model()
    model.connector, shown = built(kind, patches=16), features(16)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        fewer = model.pooled(shown)
        assert torch.equal(model.connector(fewer.to(shown.dtype)), model.connector(shown))
    assert not fewer.requires_grad
    assert shown.nbytes == fewer.nbytes * (16 // 4) * (2 if bf16 else 1)


@each
def test_gradient_reaches_every_parameter(kind: type) -> None:
    connector = built(kind)
    out = connector(features())
    (out * torch.randn(out.shape, generator=torch.Generator().manual_seed(2))).sum().backward()
    lost = [name for name, p in connector.named_parameters() if p.grad is None or not torch.isfinite(p.grad).all()]
    assert lost == []
    # a key's bias shifts all scores of a query alike, and softmax does not see that: its gradient is zero by nature
    still = [name for name, p in connector.named_parameters() if not p.grad.any()]
    assert [name for name in still if not name.endswith("key.bias")] == []


@each
def test_images_do_not_see_each_other(kind: type) -> None:
    connector, together = built(kind).eval(), features()
    alone = torch.cat([connector(image[None]) for image in together])
    torch.testing.assert_close(connector(together), alone, rtol=1e-5, atol=1e-6)


@each
def test_every_image_makes_its_own_tokens(kind: type) -> None:
    out = built(kind)(features())
    assert not torch.allclose(out[0], out[1])


@each
def test_save_then_load_gives_equal_outputs(kind: type, tmp_path: Path) -> None:
    first = built(kind).eval()
    save_whole(first, tmp_path / "connector.safetensors")
    torch.manual_seed(99)
    second = small(kind).build(24, 32, 4).eval()
    assert not torch.equal(first(features()), second(features()))
    load_whole(second, tmp_path / "connector.safetensors")
    assert torch.equal(first(features()), second(features()))
    assert load_file(str(tmp_path / "connector.safetensors")).keys() == dict(first.named_parameters()).keys()


@each
def test_config_goes_through_yaml_and_comes_back_equal(kind: type) -> None:
    adapter, config = TypeAdapter(ConnectorConfig), small(kind)
    text = yaml.safe_dump(adapter.dump_python(config, mode="json"))
    assert adapter.validate_python(yaml.load(text, Loader=Loader)) == config


@each
def test_type_alone_chooses_the_class(kind: type) -> None:
    name = kind.__dataclass_fields__["type"].default
    assert type(TypeAdapter(ConnectorConfig).validate_python({"type": name})) is kind


@each
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_forward_in_another_precision_is_finite(kind: type, dtype: torch.dtype) -> None:
    out = built(kind).to(dtype)(features().to(dtype))
    assert out.dtype == dtype
    assert torch.isfinite(out).all()


@each
def test_packed_loss_equals_separate_losses(kind: type) -> None:
    config = small(kind)
    model = make_model(connector=config).eval()
    processor = make_processor(config.num_tokens(4))
    examples = [processor(make_sample(i, num_images=n)) for i, n in enumerate((1, 0, 2))]
    shape, objective = (3, 28, 28), NextToken(model)

    def loss(group: list) -> Tensor:
        return objective(**model_inputs(collate([join(group, shape)], shape), torch.device("cpu")))

    with torch.no_grad():
        torch.testing.assert_close(loss(examples), sum(loss([e]) for e in examples), rtol=1e-6, atol=1e-5)


def test_connector_types_are_all_different() -> None:
    names = [kind.__dataclass_fields__["type"].default for kind in KINDS]
    assert len(set(names)) == len(names)


def test_qformer_is_blip2s_by_default() -> None:
    config = QFormerConnector()
    assert (config.num_queries, config.hidden_size, config.num_layers, config.num_heads) == (32, 768, 12, 12)
    assert config.num_tokens(256) == config.num_tokens(576) == 32


def test_qformer_of_default_size_turns_any_patches_into_32_tokens() -> None:
    connector = QFormerConnector(num_layers=2).build(24, 32, 16)
    with torch.no_grad():
        assert connector(features(16, images=1)).shape == (1, 32, 32)


@pytest.mark.parametrize("every", [1, 2, 3])
def test_qformer_looks_at_the_image_in_every_kth_block_from_the_first(every: int) -> None:
    connector = small(QFormerConnector, num_layers=6, cross_attention_every=every)
    connector.cross_attention_every = every
    looking = [hasattr(layer, "crossattention") for layer in connector.build(24, 32, 4).blocks.encoder.layer]
    assert looking == [number % every == 0 for number in range(6)]


@pytest.mark.parametrize("depth", [2, 3, 4])
def test_mlp_has_as_many_linear_layers_as_its_depth(depth: int) -> None:
    linear = [m for m in MLPConnector(depth=depth).build(24, 32, 4) if isinstance(m, nn.Linear)]
    assert [(m.in_features, m.out_features) for m in linear] == [(24, 32)] + [(32, 32)] * (depth - 1)


def test_mlp_of_depth_one_is_refused_with_the_alternative() -> None:
    with pytest.raises(ValueError, match="linear"):
        MLPConnector(depth=1).build(24, 32, 4)


def test_pixel_shuffle_joins_the_patches_of_a_block_in_reading_order() -> None:
    from mllm.models.connectors.pixel_shuffle import Shuffle

    features = torch.arange(16.0).reshape(1, 16, 1)  # a grid of 4 x 4, each patch its own number
    tokens = Shuffle(2)(features)
    assert tokens[0].tolist() == [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]


INSTRUCT = QFormerConnector(num_queries=4, hidden_size=16, num_layers=4, num_heads=2, instruct=True)


def instructed(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return INSTRUCT.build(24, 32, 4)


def words(number: int = 5, images: int = 3) -> tuple[Tensor, Tensor]:
    """Embeddings of an instruction for each image, and that all of them are words."""
    drawn = torch.randn(images, number, 32, generator=torch.Generator().manual_seed(4))
    return drawn, torch.ones(images, number, dtype=torch.bool)


def test_instruction_changes_the_tokens_of_its_own_image_alone() -> None:
    connector, (said, mask) = instructed().eval(), words()
    other = said.clone()
    other[1] += 1
    one, changed = connector(features(), said, mask), connector(features(), other, mask)
    assert one.shape == (3, 4, 32)
    assert not torch.allclose(one[1], changed[1], atol=1e-4)
    torch.testing.assert_close(one[[0, 2]], changed[[0, 2]], rtol=0, atol=1e-6)


def test_instructions_of_different_length_side_by_side_are_those_alone() -> None:
    connector, (said, mask) = instructed().eval(), words()
    mask[0, 2:] = False
    together = connector(features(), said, mask)
    alone = connector(features(images=3)[:1], said[:1, :2], mask[:1, :2])
    torch.testing.assert_close(together[:1], alone, rtol=1e-5, atol=1e-6)


def test_no_instruction_is_an_instruction_without_a_word() -> None:
    connector, (said, mask) = instructed().eval(), words()
    torch.testing.assert_close(connector(features()), connector(features(), said, mask & False), rtol=1e-5, atol=1e-6)


def test_gradient_reaches_every_parameter_that_reads_an_instruction() -> None:
    connector = instructed()
    out = connector(features(), *words())
    (out * torch.randn(out.shape, generator=torch.Generator().manual_seed(2))).sum().backward()
    still = [name for name, p in connector.named_parameters() if p.grad is None or not p.grad.any()]
    assert [name for name in still if not name.endswith("key.bias")] == []
    connector.zero_grad()
    connector(features()).sum().backward()
    assert [name for name, p in connector.named_parameters() if p.grad is None] == []


def test_avg_pool_tokens_are_means_of_their_blocks() -> None:
    pool = AvgPoolConnector(tokens=4, depth=1).build(1, 1, 16)[0]
    features = torch.arange(16.0).reshape(1, 16, 1)  # a grid of 4 x 4, each patch its own number
    assert pool(features).flatten().tolist() == [(0 + 1 + 4 + 5) / 4, 4.5, 10.5, (10 + 11 + 14 + 15) / 4]


def test_avg_pool_of_all_patches_is_the_mlp() -> None:
    pooled, mlp = built(AvgPoolConnector, patches=4), built(MLPConnector, patches=4)
    assert torch.equal(pooled(features(4)), mlp(features(4)))


def test_avg_pool_weights_of_one_token_count_serve_another(tmp_path: Path) -> None:
    """Open-Qwen2VL learns with 144 tokens and goes on with 729."""
    few, all_of_them = (AvgPoolConnector(tokens=tokens).build(24, 32, 729) for tokens in (144, 729))
    save_whole(few, tmp_path / "connector.safetensors")
    load_whole(all_of_them, tmp_path / "connector.safetensors")
    assert (few(features(729)).shape[1], all_of_them(features(729)).shape[1]) == (144, 729)
    flat = torch.ones(1, 729, 24)
    torch.testing.assert_close(few(flat)[:, 0], all_of_them(flat)[:, 0], rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", [AvgPoolConnector, CAbstractorConnector])
@pytest.mark.parametrize(
    ("tokens", "patches", "said"), [(5, 16, "tokens must be a"), (4, 15, "patches"), (25, 16, "more")]
)
def test_pooling_that_cannot_be_is_refused_before_any_weight(kind: type, tokens: int, patches: int, said: str) -> None:
    with pytest.raises(ValueError, match=rf"{tokens} tokens on {patches} patches: .*{said}"):
        kind(tokens=tokens).num_tokens(patches)


def test_resampler_and_c_abstractor_are_the_papers_by_default() -> None:
    flamingo, honeybee = ResamplerConnector(), CAbstractorConnector()
    assert (flamingo.num_queries, flamingo.num_layers, flamingo.num_heads) == (64, 6, 16)
    assert (honeybee.tokens, honeybee.hidden_size, honeybee.depth, honeybee.mlp_depth) == (144, 1024, 3, 2)


def test_resampler_whose_heads_do_not_divide_its_width_is_refused() -> None:
    with pytest.raises(ValueError, match="hidden_size 16 with 3 heads"):
        ResamplerConnector(hidden_size=16, num_heads=3).build(24, 32, 4)


@pytest.mark.parametrize("kind", [QFormerConnector, ResamplerConnector])
def test_queries_read_patches_in_any_order_alike(kind: type) -> None:
    """The encoder has put positions into its features; queries look at a set."""
    connector, shown = built(kind, patches=16).eval(), features(16)
    torch.testing.assert_close(connector(shown), connector(shown.flip(1)), rtol=1e-4, atol=1e-5)


def test_c_abstractor_token_knows_its_neighbourhood_and_not_the_far_side() -> None:
    """A block reaches one patch further; squeeze and excitation is held, which looks at the whole map."""
    connector = CAbstractorConnector(tokens=64, hidden_size=16, depth=1, mlp_depth=1).build(24, 32, 64).eval()
    for block in (connector.before[0], connector.behind[0]):
        nn.init.zeros_(block.excite.weight)
    shown = features(64, images=1)
    changed = shown.clone()
    changed[0, 0] += 1
    moved = (connector(changed) - connector(shown))[0].abs().amax(-1).reshape(8, 8) > 1e-6
    assert moved[:3, :3].all()
    assert not moved[3:].any()
    assert not moved[:, 3:].any()


def test_mlp_with_a_norm_takes_no_notice_of_the_scale_of_features() -> None:
    """Layers side by side differ in scale: VipLlava puts a LayerNorm over them."""
    normed, plain = MLPConnector(norm=True).build(24, 32, 4), built(MLPConnector)
    torch.testing.assert_close(normed(100 * features()), normed(features()), rtol=1e-3, atol=1e-4)
    assert not torch.allclose(plain(100 * features()), plain(features()), atol=1e-2)


SHUFFLES = [
    PixelShuffleConnector(norm=True),
    PixelShuffleConnector(activation="swiglu"),
    PixelShuffleConnector(depth=1),
]


@pytest.mark.parametrize("config", SHUFFLES, ids=lambda config: f"{config.norm} {config.activation} {config.depth}")
def test_every_form_of_a_pixel_shuffle_keeps_its_promises(config: PixelShuffleConnector, tmp_path: Path) -> None:
    torch.manual_seed(0)
    connector = config.build(24, 32, 16)
    out = connector(features(16))
    assert out.shape == (3, config.num_tokens(16), 32)
    (out * torch.randn(out.shape)).sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in connector.parameters())
    assert any(isinstance(module, nn.LayerNorm) for module in connector) == config.norm
    save_whole(connector, tmp_path / "connector.safetensors")
    again = config.build(24, 32, 16)
    load_whole(again, tmp_path / "connector.safetensors")
    assert torch.equal(again(features(16)), out)


def test_swiglu_is_the_stock_projector_of_the_same_weights() -> None:
    from transformers.models.cohere2_vision.configuration_cohere2_vision import Cohere2VisionConfig
    from transformers.models.cohere2_vision.modeling_cohere2_vision import Cohere2VisionMultiModalProjector

    settings = Cohere2VisionConfig(
        vision_config={"model_type": "siglip_vision_model", "hidden_size": 24},
        text_config={"model_type": "llama", "hidden_size": 32},
        alignment_intermediate_size=64,
    )
    stock = Cohere2VisionMultiModalProjector(settings)
    ours = PixelShuffleConnector(activation="swiglu").build(24, 32, 16)
    ours[1].load_state_dict(stock.linear_1.state_dict())
    ours[3].load_state_dict(stock.linear_2.state_dict())
    torch.testing.assert_close(ours(features(16)), stock(features(16)).flatten(1, 2), rtol=0, atol=1e-6)


def test_swiglu_of_another_depth_is_refused_with_the_depth() -> None:
    with pytest.raises(ValueError, match="depth 3 with swiglu: it has two linear layers"):
        PixelShuffleConnector(activation="swiglu", depth=3).build(24, 32, 16)
