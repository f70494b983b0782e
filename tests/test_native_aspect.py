"""Images that keep their aspect: grids, pixels and features are those of transformers' SigLIP2 NaFlex."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoImageProcessor, AutoModel, Siglip2ImageProcessor

from conftest import make_clip, make_image_processor, make_llm, make_tokenizer, picture
from mllm.assembly import build_processor
from mllm.config import RunConfig
from mllm.data.collate import collate
from mllm.data.loader import DataConfig
from mllm.data.packing import join
from mllm.data.processor import Processor
from mllm.export.trained import prompt_obstacle
from mllm.generate import Assistant
from mllm.models.build import ModelConfig, build_model, check_aspect
from mllm.models.connectors import AvgPoolConnector, LinearConnector, MLPConnector, QFormerConnector
from mllm.native_aspect import NativeAspect
from mllm.prospect import prospect
from mllm.train.losses import NextToken, model_inputs
from mllm.train.settings import TrainConfig
from mllm.train.trainable import LearningRates
from models.encoder_families import MODELS
from models.test_image_newline import samples
from test_any_resolution import sizes

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_parts(tmp_path_factory.mktemp("naflex"))


def write_parts(folder: Path) -> Path:
    """A NaFlex of up to nine patches of 14 pixels, a CLIP, and an LLM."""
    torch.manual_seed(0)
    MODELS["naflex"]().save_pretrained(folder / "encoder")
    Siglip2ImageProcessor(patch_size=14, max_num_patches=9).save_pretrained(folder / "encoder")
    make_clip().save_pretrained(folder / "clip")
    make_image_processor().save_pretrained(folder / "clip")
    make_llm().save_pretrained(folder / "llm")
    make_tokenizer().save_pretrained(folder / "llm")
    return folder


def config(parts: Path, connector: Any = None, encoder: str = "encoder", **data: Any) -> RunConfig:
    model = ModelConfig(str(parts / encoder), str(parts / "llm"), connector or MLPConnector())
    train = TrainConfig(parts / "out", learning_rate=LearningRates(connector=1e-3))
    return RunConfig(train, DataConfig(**{"image_fit": "aspect", **data}), model)


def built(parts: Path) -> tuple[Processor, Any]:
    own = config(parts)
    processor = build_processor(own)
    torch.manual_seed(1)
    return processor, build_model(own.parts(), processor.image_token_id, layout=processor.layout)


@pytest.mark.parametrize(("patch", "most"), [(14, 9), (16, 256), (14, 729), (16, 1024)])
def test_grids_of_a_thousand_sizes_are_those_of_the_stock_image_processor(patch: int, most: int) -> None:
    from transformers.models.siglip2.image_processing_pil_siglip2 import get_image_size_for_max_num_patches

    aspect = NativeAspect(int(most**0.5) * patch, patch)
    assert aspect.most == most
    for width, height in sizes(1000):
        high, wide = get_image_size_for_max_num_patches(height, width, patch, most)
        assert aspect.patches(width, height) == (high // patch, wide // patch), (width, height)
        assert aspect.num_tokens(width, height) <= most


def test_pixels_and_features_are_those_of_the_stock_processor_and_model(parts: Path) -> None:
    processor, model = built(parts)
    stock = AutoModel.from_pretrained(parts / "encoder").vision_model
    images = AutoImageProcessor.from_pretrained(parts / "encoder")
    for number, size in enumerate([(60, 20), (20, 60), (31, 150), (33, 32), (100, 55)]):
        image = picture(number, size)
        wanted = images(images=[image], return_tensors="pt")
        rows, columns = processor.slots.native_aspect.patches(*size)  # type: ignore[union-attr]
        assert wanted["spatial_shapes"].tolist() == [[rows, columns]]
        own = slice(rows * columns)
        with torch.no_grad():
            pixels = processor.normalisation(processor.pixels([image]))  # type: ignore[misc]
            made = model.vision_encoder.inputs(pixels, [(rows, columns)])
            states = stock(**wanted, output_hidden_states=True).hidden_states[-2]
            found = model.vision_encoder(processor.pixels([image]), [(rows, columns)])
        patches = [told["pixel_values"][:, own] for told in (made, wanted)]
        torch.testing.assert_close(*patches, rtol=0, atol=1e-6)
        assert torch.equal(made["pixel_attention_mask"], wanted["pixel_attention_mask"])
        torch.testing.assert_close(found[:, own], states[:, own], rtol=1e-5, atol=1e-5)


def test_planned_slots_are_the_features_of_a_thousand_sizes_and_of_images(parts: Path) -> None:
    processor, model = built(parts)
    for width, height in sizes(1000):
        grid = processor.slots.native_aspect.patches(width, height)  # type: ignore[union-attr]
        assert processor.slots.number(1, [(height, width)]) == grid[0] * grid[1]
    made = [processor(sample) for sample in samples()]
    for example in made[1:]:
        features = model.visual_tokens(example.pixel_values, None, example.image_sizes)
        assert len(features) == example.input_ids.count(processor.image_token_id)
    assert len({example.input_ids.count(processor.image_token_id) for example in made}) == 4
    assert processor.slots.token_range[1] == 9


def test_packed_samples_of_any_aspect_are_the_same_samples_alone_also_without_images(parts: Path) -> None:
    processor, model = built(parts)
    examples, shape = [processor(sample) for sample in samples()], processor.pixel_shape
    model.requires_grad_(True)
    together = collate([join(examples[:2], shape), join(examples[2:], shape)], shape)
    apart = [collate([join([example], shape)], shape) for example in examples]
    objective = NextToken(model)
    whole, alone = objective(**model_inputs(together, CPU)), [objective(**model_inputs(one, CPU)) for one in apart]
    torch.testing.assert_close(whole, sum(alone), rtol=1e-5, atol=1e-5)
    weight = model.connector[0].weight
    gradients = [torch.autograd.grad(loss, weight)[0] for loss in (whole, sum(alone))]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)
    assert not torch.autograd.grad(objective(**model_inputs(apart[0], CPU)), weight)[0].any()


def test_a_saved_processor_reads_images_alike_and_chat_answers(parts: Path, tmp_path: Path) -> None:
    processor, model = built(parts)
    processor.save(tmp_path)
    loaded, sample = Processor.load(tmp_path), samples()[2]
    assert loaded.slots.native_aspect == processor.slots.native_aspect
    assert torch.equal(loaded(sample).pixel_values, processor(sample).pixel_values)
    sample.messages.pop()
    assistant = Assistant(model, loaded)
    whole = assistant.answer([sample], 4)[0]
    assert "".join(assistant.stream(sample, 4)).strip() == whole


def test_export_is_refused_with_the_reason_that_is_the_encoders_own(parts: Path) -> None:
    told = prompt_obstacle(config(parts).data)
    assert told.startswith("data.image_fit: aspect is not exported: Siglip2ImageProcessor makes these patches, but no")
    assert prospect(config(parts), built(parts)[1]).why == told
    assert "Siglip2" not in prompt_obstacle(DataConfig(tiles="dynamic"))


def test_encoders_and_connectors_that_need_a_square_are_refused(parts: Path) -> None:
    check_aspect(config(parts, LinearConnector()).parts())
    with pytest.raises(ValueError, match=r"aspect with clip_vision_model: SigLIP2 NaFlex alone"):
        build_processor(config(parts, encoder="clip"))
    for connector in (AvgPoolConnector(tokens=4), QFormerConnector()):
        with pytest.raises(ValueError, match=rf"aspect with a {connector.type} connector.*mlp or linear"):
            build_processor(config(parts, connector))
    with pytest.raises(ValueError, match="tiles fit by themselves"):
        build_processor(config(parts, tiles="dynamic"))
