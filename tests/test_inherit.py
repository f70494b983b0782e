"""A stage starts from another: with all of it, with parts of it, with other parts around it; never in silence."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import make_clip, make_image_processor, make_llm, make_processor, make_tokenizer
from mllm.any_resolution import AnyResolution
from mllm.config import RunConfig, dump_config
from mllm.inherit import take_over
from mllm.models.build import ModelConfig, build_model
from mllm.models.connectors import AvgPoolConnector, MLPConnector, QFormerConnector
from mllm.models.multimodal import MultimodalLM
from mllm.train.settings import TrainConfig
from mllm.train.stage_folder import load_stage, save_stage
from mllm.train.trainable import LearningRates, choose_trainable
from mllm.train.tuning.adapters import Lora

QFORMER = {"hidden_size": 16, "num_layers": 2, "num_heads": 2}
FULL = {"learning_rate": LearningRates(connector=1e-3, llm=1e-3, vision_encoder=1e-3)}
LORA = {"learning_rate": LearningRates(connector=1e-3, llm=1e-3), "lora": Lora(rank=2)}
PARTS = ["connector", "llm", "vision_encoder"]
ALIGN = {"learning_rate": LearningRates(connector=1e-3)}
TILES = AnyResolution(28, 2, ((2, 1), (1, 2)))
"""What a processor with `data.tiles: anyres` asks for."""


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Encoders and LLMs to choose from: another of the same size, a wider, a deeper, a shallower one."""
    folder = tmp_path_factory.mktemp("shelf")
    for name, seed in (("encoder", 0), ("other_encoder", 9)):
        make_clip(seed).save_pretrained(folder / name)
        make_image_processor().save_pretrained(folder / name)
    sizes: dict[str, dict[str, Any]] = {
        "llm": {},
        "other_llm": {"seed": 9},
        "wide_llm": {"hidden_size": 64},
        "deep_llm": {"num_hidden_layers": 3},
        "flat_llm": {"num_hidden_layers": 1},
    }
    for name, more in sizes.items():
        make_llm(**more).save_pretrained(folder / name)
        make_tokenizer().save_pretrained(folder / name)
    return folder


@pytest.fixture
def finished(shelf: Path, tmp_path: Path) -> Callable[..., Path]:
    """Write a stage whose trained weights all differ from where they began."""

    def stage(training: dict[str, Any], name: str = "before", **parts: Any) -> Path:
        tiles = parts.pop("tiles", None)
        config = run(shelf, tmp_path / name, **parts, training=training)
        model = build_model(config.parts(), 384, layout=tiles)
        choose_trainable(model, config.train.learning_rate, config.train.lora)
        torch.manual_seed(5)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data += 0.1 * torch.randn_like(parameter)
        (tmp_path / name).mkdir()
        save_stage(tmp_path / name, model, make_processor(), dump_config(config))
        return tmp_path / name

    return stage


def run(
    shelf: Path,
    out: Path,
    encoder: str = "encoder",
    llm: str = "llm",
    connector: Any = None,
    training: dict[str, Any] | None = None,
    **more: Any,
) -> RunConfig:
    parts = {name: more.pop(name) for name in ("feature_layer",) if name in more}
    model = ModelConfig(str(shelf / encoder), str(shelf / llm), connector or MLPConnector(), **parts)
    return RunConfig(TrainConfig(output_dir=out, **(training or {})), model=model, **more)


def started(config: RunConfig, tiles: AnyResolution | None = None) -> tuple[MultimodalLM, str]:
    torch.manual_seed(1)
    model = build_model(config.parts(), 384, layout=tiles)
    return model, take_over(config, model)


def weights(model: MultimodalLM, part: str) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in getattr(model, part).named_parameters()}


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("training", [ALIGN, LORA, FULL], ids=["align", "lora", "full"])
def test_stage_of_the_same_parts_takes_over_all_that_was_trained(shelf, finished, tmp_path, training) -> None:
    before = finished(training)
    model, told = started(run(shelf, tmp_path / "now", init_from=before))
    trained = [part for part in PARTS if getattr(training["learning_rate"], part)]
    assert told == f"starting from {before} with its {', '.join(trained)}"
    again, _ = started(RunConfig(TrainConfig(tmp_path), init_from=before))  # the model section is the stage's own
    assert all(equal(weights(model, part), weights(again, part)) for part in PARTS)


@pytest.mark.parametrize("kept", [["connector"], ["llm"], ["llm", "vision_encoder"], []], ids=str)
def test_parts_that_are_left_out_start_anew_and_the_others_do_not(shelf, finished, tmp_path, kept: list[Any]) -> None:
    before = finished(FULL)
    whole, _ = started(run(shelf, tmp_path / "now", init_from=before))
    model, told = started(run(shelf, tmp_path / "now", init_from=before, init_parts=kept))
    torch.manual_seed(1)
    untouched = build_model(run(shelf, tmp_path).parts(), 384)
    for part in PARTS:
        assert equal(weights(model, part), weights(whole if part in kept else untouched, part))
        assert not equal(weights(whole, part), weights(untouched, part))
    assert f"started anew: {', '.join(part for part in PARTS if part not in kept)}" in told


def test_llm_is_swapped_and_the_connector_goes_on_if_it_fits(shelf, finished, tmp_path) -> None:
    before = finished(ALIGN)
    model, told = started(run(shelf, tmp_path / "now", llm="other_llm", init_from=before))
    same, _ = started(run(shelf, tmp_path / "now", init_from=before))
    assert equal(weights(model, "connector"), weights(same, "connector"))
    assert not equal(weights(model, "llm"), weights(same, "llm"))
    assert told.endswith(f"llm: {shelf / 'llm'} there, {shelf / 'other_llm'} here")


def test_llm_of_another_width_is_refused_until_the_connector_is_left_out(shelf, finished, tmp_path) -> None:
    before = finished(ALIGN)
    said = r"2\.weight: \(32, 32\) in the file, \(64, 64\) in the model[^$]*llm changed since .*leave a part out"
    with pytest.raises(ValueError, match=said):
        started(run(shelf, tmp_path / "now", llm="wide_llm", init_from=before))
    model, told = started(run(shelf, tmp_path / "now", llm="wide_llm", init_from=before, init_parts=[]))
    assert model.connector[-1].out_features == 64
    assert "started anew: connector" in told


@pytest.mark.parametrize("training", [LORA, FULL], ids=["lora", "full"])
def test_what_was_learned_in_one_llm_is_not_put_into_another_unasked(shelf, finished, tmp_path, training) -> None:
    before = finished(training)
    said = r"trained the llm .*/llm, this run has .*/other_llm: .*--init_parts connector"
    with pytest.raises(ValueError, match=said):
        started(run(shelf, tmp_path / "now", llm="other_llm", init_from=before))
    model, _ = started(run(shelf, tmp_path / "now", llm="other_llm", init_from=before, init_parts=["connector"]))
    untouched = build_model(run(shelf, tmp_path, llm="other_llm").parts(), 384)
    assert equal(weights(model, "llm"), weights(untouched, "llm"))


@pytest.mark.parametrize("llm", ["deep_llm", "flat_llm", "wide_llm"])
@pytest.mark.parametrize("training", [LORA, FULL], ids=["lora", "full"])
def test_weights_that_find_no_place_are_named_even_where_the_user_insists(
    shelf, finished, tmp_path, training, llm
) -> None:
    """peft would drop the layers that are not there, and leave new ones without an adapter, both in silence."""
    before = finished(training)
    config = run(shelf, tmp_path / "now", llm=llm, init_from=before, init_parts=["llm"], training=training)
    with pytest.raises(ValueError, match=r"does not fit[^$]*(lora_|layers|weight)|adapter sits in 14 layers, .* 21"):
        choose_trainable(started(config)[0], config.train.learning_rate, config.train.lora)


def test_encoder_that_was_trained_is_not_swapped_unasked(shelf, finished, tmp_path) -> None:
    before = finished(FULL)
    with pytest.raises(ValueError, match=r"the vision_encoder .*--init_parts connector llm takes over the rest"):
        started(run(shelf, tmp_path / "now", encoder="other_encoder", init_from=before))


def test_token_count_of_a_pooling_connector_changes_between_stages(shelf, finished, tmp_path) -> None:
    before = finished(ALIGN, connector=AvgPoolConnector(tokens=1))
    model, told = started(run(shelf, tmp_path / "now", connector=AvgPoolConnector(tokens=4), init_from=before))
    few, _ = started(run(shelf, tmp_path / "now", connector=AvgPoolConnector(tokens=1), init_from=before))
    assert equal(weights(model, "connector"), weights(few, "connector"))
    pixels = torch.zeros(1, 3, 28, 28)
    assert (few.visual_tokens(pixels).shape[1], model.visual_tokens(pixels).shape[1]) == (1, 4)
    assert "tokens=1" in told
    assert "tokens=4" in told


def test_more_queries_are_refused_with_both_shapes(shelf, finished, tmp_path) -> None:
    before = finished(ALIGN, connector=QFormerConnector(num_queries=4, **QFORMER))
    more = QFormerConnector(num_queries=8, **QFORMER)
    with pytest.raises(
        ValueError, match=r"queries: \(1, 4, 16\) in the file, \(1, 8, 16\)[^$]*connector changed since"
    ):
        started(run(shelf, tmp_path / "now", connector=more, init_from=before))


def test_other_feature_layer_is_said(shelf, finished, tmp_path) -> None:
    """Its shapes fit, its features mean something else."""
    _, told = started(run(shelf, tmp_path / "now", feature_layer=-1, init_from=finished(ALIGN)))
    assert told.endswith("feature_layer: -2 there, -1 here")


def test_part_that_was_never_trained_cannot_be_taken_over(shelf, finished, tmp_path) -> None:
    with pytest.raises(ValueError, match=r"init_parts names llm, but .* trained connector only"):
        started(run(shelf, tmp_path / "now", init_from=finished(ALIGN), init_parts=["connector", "llm"]))


def test_same_parts_by_another_path_are_the_same(shelf, finished, tmp_path, monkeypatch) -> None:
    before = finished(LORA)
    monkeypatch.chdir(shelf)
    config = run(shelf, tmp_path / "now", init_from=before)
    config.model.llm = "llm"
    _, told = started(config)
    assert told == f"starting from {before} with its connector, llm"


def test_tiles_that_are_added_start_with_a_new_newline_which_is_named(shelf, finished, tmp_path) -> None:
    before = finished(ALIGN)
    model, told = started(run(shelf, tmp_path / "now", init_from=before, training=ALIGN), TILES)
    plain, _ = started(run(shelf, tmp_path / "now", init_from=before))
    assert told == f"starting from {before} with its connector\n  started anew: image_newline"
    assert equal(weights(model, "connector"), weights(plain, "connector"))
    with pytest.raises(ValueError, match=r"has no image_newline[^$]*learning_rate.connector a rate"):
        started(
            run(shelf, tmp_path / "now", init_from=before, training={"learning_rate": LearningRates(llm=1e-3)}), TILES
        )


def test_newline_goes_on_or_is_left_behind_where_nobody_reads_it(shelf, finished, tmp_path) -> None:
    before = finished(ALIGN, tiles=TILES)
    model, told = started(run(shelf, tmp_path / "now", init_from=before), TILES)
    again, _ = started(run(shelf, tmp_path / "again", init_from=before), AnyResolution(28, 2, ((3, 3),)))
    assert told == f"starting from {before} with its connector, image_newline"
    assert equal(weights(model, "image_newline"), weights(again, "image_newline"))
    torch.manual_seed(1)
    assert not equal(
        weights(model, "image_newline"),
        weights(build_model(run(shelf, tmp_path).parts(), 384, layout=TILES), "image_newline"),
    )
    _, told = started(run(shelf, tmp_path / "now", init_from=before))
    assert "with its connector\n" in told
    assert "image_newline: left behind" in told


def test_stage_without_a_newline_is_not_read_as_one_with_it(shelf, finished, tmp_path) -> None:
    model = build_model(run(shelf, tmp_path).parts(), 384, layout=TILES)
    with pytest.raises(ValueError, match=r"has no image_newline.safetensors: it was trained without data.tiles anyres"):
        load_stage(model, finished(ALIGN))
