"""Ids to a model: folders in the Hub's format, from config alone or with their weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    CLIPModel,
    CLIPVisionModel,
    Gemma2Config,
    SiglipConfig,
    SiglipModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from conftest import make_llm, make_processor, picture
from mllm.models.build import ModelConfig, build_model, visual_tokens_per_image
from mllm.models.connectors import ConnectorConfig, LinearConnector, MLPConnector, QFormerConnector

SMALL_QFORMER = QFormerConnector(num_queries=3, hidden_size=16, num_layers=2, num_heads=2)
SIGLIP = {"hidden_size": 24, "intermediate_size": 48, "num_attention_heads": 2, "num_hidden_layers": 2}
IMAGE = {"image_size": 42, "patch_size": 14}


@pytest.fixture(scope="module")
def encoders(hub: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders as the Hub has them: whole CLIP and SigLIP, and their vision halves alone."""
    folder = tmp_path_factory.mktemp("encoders")
    CLIPVisionModel.from_pretrained(hub / "encoder").save_pretrained(folder / "clip_vision")
    torch.manual_seed(0)
    text = {**SIGLIP, "vocab_size": 64, "max_position_embeddings": 16}
    SiglipModel(SiglipConfig(text_config=text, vision_config={**SIGLIP, **IMAGE})).save_pretrained(folder / "siglip")
    SiglipVisionModel(SiglipVisionConfig(**SIGLIP, **IMAGE)).save_pretrained(folder / "siglip_vision")
    return {"clip": hub / "encoder", **{path.name: path for path in folder.iterdir()}}


def config(hub: Path, encoder: Path | None = None, connector: ConnectorConfig | None = None, **more) -> ModelConfig:
    return ModelConfig(str(encoder or hub / "encoder"), str(hub / "llm"), connector or MLPConnector(), **more)


@pytest.mark.parametrize("name", ["clip", "clip_vision", "siglip", "siglip_vision"])
@pytest.mark.parametrize("connector", [MLPConnector(), LinearConnector(), SMALL_QFORMER], ids=lambda c: c.type)
def test_visual_tokens_from_config_equal_those_of_the_model(hub, encoders, name, connector) -> None:
    chosen = config(hub, encoders[name], connector)
    model = build_model(chosen, make_processor().image_token_id)
    size = model.vision_encoder.model.config.image_size
    assert model.visual_tokens(torch.zeros(2, 3, size, size)).shape == (2, visual_tokens_per_image(chosen), 32)


def test_whole_clip_and_its_vision_half_give_equal_features(hub, encoders) -> None:
    pixels = torch.randn(1, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    whole, half = (build_model(config(hub, encoders[name]), 384).vision_encoder for name in ("clip", "clip_vision"))
    assert torch.equal(whole(pixels), half(pixels))
    states = CLIPModel.from_pretrained(hub / "encoder").vision_model(pixels, output_hidden_states=True).hidden_states
    torch.testing.assert_close(whole(pixels), states[-2][:, 1:], rtol=0, atol=1e-6)


def test_everything_is_frozen_when_built(hub) -> None:
    assert not any(p.requires_grad for p in build_model(config(hub), 384).parameters())


def test_llm_is_the_folders_own_untouched(hub) -> None:
    """The placeholder needs no row: the vocabulary stays as it is, so the LLM can be named instead of copied."""
    built = build_model(config(hub), make_processor().image_token_id).llm
    own = AutoModelForCausalLM.from_pretrained(hub / "llm")
    assert built.get_input_embeddings().num_embeddings == own.get_input_embeddings().num_embeddings
    assert all(torch.equal(a, b) for a, b in zip(built.parameters(), own.parameters(), strict=True))


def test_encoder_normalises_as_the_image_processor_in_its_folder(hub) -> None:
    whole = make_processor().image_processor(images=[picture(1)], return_tensors="pt")["pixel_values"]
    encoder = build_model(config(hub), 384).vision_encoder
    pixels = make_processor().pixels([picture(1)])
    assert pixels.dtype == torch.uint8
    torch.testing.assert_close(encoder.normalised(pixels), whole, rtol=0, atol=1e-6)
    torch.testing.assert_close(encoder(pixels), encoder(whole), rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_dtype_is_of_the_frozen_parts(hub, dtype) -> None:
    model = build_model(config(hub, dtype=dtype), 384)
    assert {p.dtype for p in model.llm.parameters()} == {getattr(torch, dtype)}
    assert {p.dtype for p in model.vision_encoder.parameters()} == {getattr(torch, dtype)}
    assert {p.dtype for p in model.connector.parameters()} == {torch.float32}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_attention_is_the_llms(hub, attention) -> None:
    assert build_model(config(hub, attention=attention), 384).llm.config._attn_implementation == attention


def test_random_weights_need_config_files_alone(hub, tmp_path) -> None:
    for name in ("encoder", "llm"):
        (tmp_path / name).mkdir()
        shutil.copy(hub / name / "config.json", tmp_path / name)
    drawn = build_model(config(tmp_path, random_weights=True), 384)
    assert drawn.vision_encoder.normalisation is None
    read = build_model(config(hub), 384)
    shapes = [{n: p.shape for n, p in model.named_parameters()} for model in (drawn, read)]
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize(("part", "said"), [("vision_encoder", "vision encoder"), ("llm", "LLM")])
@pytest.mark.parametrize("name", ["no/such-model", "/no/such/folder", "empty"])
@pytest.mark.parametrize("random_weights", [False, True])
def test_missing_model_is_one_value_error_naming_part_and_place(hub, tmp_path, part, said, name, random_weights):
    if name == "empty":
        name = str(tmp_path)
    chosen = config(hub, random_weights=random_weights)
    setattr(chosen, part, name)
    with pytest.raises(ValueError, match=said) as raised:
        build_model(chosen, 384)
    assert name in str(raised.value)
    assert len(str(raised.value).splitlines()) == 1


def test_missing_encoder_is_told_before_any_weight_is_read(hub) -> None:
    with pytest.raises(ValueError, match="vision encoder"):
        visual_tokens_per_image(config(hub, Path("no/such")))


def test_encoder_without_images_in_it_is_refused_in_words(hub) -> None:
    """An LLM where the encoder belongs, as a mixed-up YAML has it."""
    with pytest.raises(ValueError, match="vision encoder"):
        visual_tokens_per_image(config(hub, hub / "llm"))


def test_llm_that_caps_its_attention_scores_builds_with_eager(hub, tmp_path) -> None:
    """Gemma 2 caps its attention scores, which sdpa cannot."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    Gemma2Config(**sizes, vocab_size=384, head_dim=8).save_pretrained(tmp_path / "llm")
    chosen = config(hub, random_weights=True)
    chosen.llm = str(tmp_path / "llm")
    chosen.attention = "eager"
    assert build_model(chosen, 384).llm.config._attn_implementation == "eager"


def test_tied_embeddings_stay_tied(hub, tmp_path) -> None:
    make_llm(tie_word_embeddings=True).save_pretrained(tmp_path / "llm")
    assert json.loads((tmp_path / "llm" / "config.json").read_text())["tie_word_embeddings"]
    chosen = config(hub)
    chosen.llm = str(tmp_path / "llm")
    llm = build_model(chosen, 384).llm
    assert llm.get_input_embeddings().weight is llm.get_output_embeddings().weight


def test_llm_without_sdpa_says_which_key_to_set_and_auto_sets_it(hub, tmp_path) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    Gemma2Config(**sizes, vocab_size=384, head_dim=8).save_pretrained(tmp_path / "llm")
    chosen = config(hub, random_weights=True)
    chosen.llm = str(tmp_path / "llm")
    chosen.attention = "sdpa"
    with pytest.raises(ValueError, match=r"set model\.attention to eager"):
        build_model(chosen, 384)
    chosen.attention = "auto"
    assert build_model(chosen, 384).llm.config._attn_implementation == "eager"
