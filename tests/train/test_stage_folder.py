"""A stage's folder holds what trained: the same hidden states after a load, over chains of stages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import make_model, make_processor
from mllm.models.connectors import LinearConnector, QFormerConnector
from mllm.models.multimodal import MultimodalLM
from mllm.train.settings import TrainConfig
from mllm.train.stage_folder import FINISHED, load_stage, save_stage
from mllm.train.trainable import choose_trainable
from runs import FULL, LORA, settings

QFORMER = QFormerConnector(num_queries=4, hidden_size=16, num_layers=2, num_heads=2)


def hidden(model: MultimodalLM) -> torch.Tensor:
    processor = make_processor()
    ids = torch.tensor([[5, *[processor.image_token_id] * 4, 7, 8, 9]])
    pixels = torch.randn(1, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model.eval()(ids, torch.arange(8)[None], pixels, 1)


def saved(folder: Path, model: MultimodalLM) -> Path:
    folder.mkdir(exist_ok=True, parents=True)
    save_stage(folder, model, make_processor(), "model: {}\n")
    return folder


def shaken(train: TrainConfig, model: MultimodalLM | None = None, **llm: Any) -> MultimodalLM:
    """As after training: every trained weight moved."""
    model = model or make_model(**llm)
    choose_trainable(model, train.learning_rate, train.lora)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    return model


def loaded(folder: Path, **llm: Any) -> MultimodalLM:
    """Frozen parts from their ids, then the stage over them; the connector starts elsewhere."""
    model = make_model(**llm)
    torch.nn.init.zeros_(model.connector[0].weight)
    load_stage(model, folder)
    return model


@pytest.mark.parametrize("llm", [{}, {"tie_word_embeddings": True}], ids=["untied", "tied"])
@pytest.mark.parametrize("more", [{}, LORA, FULL], ids=["connector", "lora", "all"])
def test_saved_stage_loads_to_equal_hidden_states(tmp_path: Path, more: dict[str, Any], llm: dict[str, Any]) -> None:
    model = shaken(settings(tmp_path, **more), **llm)
    folder = saved(tmp_path / "stage", model)
    assert torch.equal(hidden(model), hidden(loaded(folder, **llm)))
    assert not torch.equal(hidden(model), hidden(make_model(**llm)))


@pytest.mark.parametrize(
    ("more", "files"),
    [({}, set()), (LORA, {"adapter"}), (FULL, {"llm.safetensors", "vision_encoder.safetensors"})],
    ids=["connector", "lora", "all"],
)
def test_stage_holds_what_trained_and_names_the_rest(tmp_path: Path, more: dict[str, Any], files: set[str]) -> None:
    folder = saved(tmp_path / "stage", shaken(settings(tmp_path, **more)))
    assert {path.name for path in folder.iterdir()} == {"config.yaml", "config.json", FINISHED, "processor", *files}


CHAINS = {
    "lora, then the connector alone": [LORA, {}],
    "full, then the connector alone": [FULL, {}],
    "lora, then lora": [LORA, LORA],
    "full, then lora": [FULL, LORA],
    "lora, then full": [LORA, FULL],
    "full, lora, full": [FULL, LORA, FULL],
    "full, lora, connector": [FULL, LORA, {}],
    "lora, full, lora": [LORA, FULL, LORA],
}


@pytest.mark.parametrize("chain", CHAINS)
def test_each_stage_keeps_what_earlier_stages_learned(tmp_path: Path, chain: str) -> None:
    folder = None
    for number, more in enumerate(CHAINS[chain]):
        start = loaded(folder) if folder else None
        model = shaken(settings(tmp_path, **more), start)
        folder = saved(tmp_path / str(number), model)
        torch.testing.assert_close(hidden(loaded(folder)), hidden(model), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "other",
    [LinearConnector(), QFORMER],
    ids=lambda c: c.type,
)
def test_stage_of_another_connector_is_refused_with_the_tensors_names(tmp_path: Path, other: Any) -> None:
    folder = saved(tmp_path / "stage", make_model())
    with pytest.raises(ValueError, match=r"connector\.safetensors does not fit[^$]*0\.weight: not in the model"):
        load_stage(make_model(connector=other), folder)


def test_stage_of_another_width_is_refused_with_both_shapes(tmp_path: Path) -> None:
    folder = saved(tmp_path / "stage", make_model())
    model = make_model()
    model.connector = torch.nn.Sequential(torch.nn.Linear(24, 16), torch.nn.GELU(), torch.nn.Linear(16, 32))
    with pytest.raises(ValueError, match=r"0\.weight: \(32, 24\) in the file, \(16, 24\) in the model"):
        load_stage(model, folder)


def test_folder_without_the_last_file_is_no_stage(tmp_path: Path) -> None:
    folder = saved(tmp_path / "stage", make_model())
    (folder / FINISHED).unlink()
    with pytest.raises(ValueError, match="no finished stage"):
        load_stage(make_model(), folder)
