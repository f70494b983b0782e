"""The predicted peak of tensor memory is what torch's allocator tells of a real optimiser step."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from transformers import AutoModelForCausalLM, MixtralConfig

from conftest import make_clip, make_image_processor, make_llm, make_processor
from engines import CONFIGS, start
from mllm.models.connectors import LinearConnector, MLPConnector, QFormerConnector
from mllm.models.image_groups import Groups
from mllm.models.multimodal import MultimodalLM
from mllm.models.quantised import is_4bit, quantise
from mllm.models.vision_encoder import VisionEncoder
from mllm.train.engine import prepare
from mllm.train.engines import zero
from mllm.train.forecasting.forecast import setup_of
from mllm.train.forecasting.levers import levers
from mllm.train.forecasting.live_memory import Tracker
from mllm.train.forecasting.memory import Memory, predict
from mllm.train.forecasting.probe import made_up
from mllm.train.forecasting.shadow import Setup, Shape, scale_bytes
from mllm.train.losses import NextToken
from mllm.train.optimizer import make_optimizer
from mllm.train.step import optimise
from mllm.train.trainable import LearningRates, Lora, choose_trainable, parameter_groups, set_mode
from mllm.train.tuning.checkpointing import switch_on
from mllm.types import Normalisation
from runs import on_two_ranks, settings

VISUAL_TOKENS = 4
SIZES = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4, "head_dim": 32, "vocab_size": 2048}
ALIGN, BOTH = LearningRates(connector=1e-3), LearningRates(connector=1e-3, llm=1e-3)
ALL = LearningRates(connector=1e-3, llm=1e-3, vision_encoder=1e-3)
SHAPE = Shape(rows=2, length=256, images=12, supervised=60)
QFORMER = QFormerConnector(num_queries=VISUAL_TOKENS, hidden_size=48, num_layers=2, num_heads=2)


def model_of(
    rates: LearningRates = ALIGN,
    lora: Lora | None = None,
    connector: Any = None,
    checkpointing: bool = False,
    dtype: torch.dtype = torch.float32,
    family: str = "llama",
    four_bit: bool = False,
    groups: Groups | None = None,
    **llm: Any,
) -> MultimodalLM:
    """Some megabytes, in the mode in which it trains."""
    encoder = VisionEncoder(make_clip().vision_model, normalisation=Normalisation.of(make_image_processor()))
    bridge = (connector or MLPConnector()).build(encoder.width, 128, encoder.num_patches)
    model = MultimodalLM(encoder, bridge, make_llm(family, **{**SIZES, **llm}), make_processor().image_token_id)
    for parameter in model.parameters():  # not the buffers: they stay in float32 when a checkpoint is read
        parameter.data = parameter.data.to(dtype)
    if four_bit:
        pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: pip install 'mllm[quantize]'")
        quantise(model.llm, dtype)
    choose_trainable(model, rates, lora)
    if checkpointing:
        switch_on(model, True)
    set_mode(model)
    model.encoder_batch = groups
    return model


def step_of(model: MultimodalLM, shape: Shape, setup: Setup) -> tuple[Callable[[], Any], int]:
    """A step as `fit` does it, after one that has made the moments; and the bytes that stand before it."""
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(cpu=True, mixed_precision=setup.mixed_precision)
    optimizer: Any = make_optimizer(parameter_groups(model, ALL, 0.0), setup.optimizer)  # type: ignore[arg-type]
    objective, optimizer = accelerator.prepare(NextToken(model), optimizer)
    block = [made_up(model, shape, VISUAL_TOKENS) for _ in range(setup.accumulation)]

    def step() -> None:
        optimise(accelerator, objective, optimizer, block, max_grad_norm=1.0)

    step()
    inner = optimizer.optimizer
    states = [state for part in getattr(inner, "parts", [inner]) for state in part.state.values()]
    kept = [value for state in states for value in state.values()] + [
        value for batch in block for value in batch.values()
    ]
    standing = [*model.parameters(), *model.buffers(), *(value for value in kept if isinstance(value, torch.Tensor))]
    scales = sum(scale_bytes(p.quant_state) for p in model.parameters() if is_4bit(p))  # type: ignore[attr-defined]
    return step, sum(tensor.untyped_storage().nbytes() for tensor in standing) + scales


def allocated(function: Callable[[], Any]) -> int:
    """Bytes that torch's CPU allocator held at most, beyond those at the beginning."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = highest = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        highest = max(highest, held)
    return highest


CASES: dict[str, tuple[dict[str, Any], Shape, Setup]] = {
    "align": ({}, SHAPE, Setup()),
    "lora": ({"rates": BOTH, "lora": Lora(rank=8)}, SHAPE, Setup()),
    "full, qwen3": ({"rates": BOTH, "family": "qwen3"}, SHAPE, Setup()),
    "full, large vocabulary: the update is the peak": (
        {"rates": BOTH, "vocab_size": 30000, "tie_word_embeddings": True},
        Shape(1, 64, 4, 8),
        Setup(),
    ),
    "full, muon": ({"rates": BOTH}, SHAPE, Setup(optimizer="muon")),
    "full, accumulated": ({"rates": BOTH}, SHAPE, Setup(accumulation=2)),
    "qlora": ({"rates": BOTH, "lora": Lora(rank=8), "four_bit": True}, SHAPE, Setup()),
    "encoder too": ({"rates": ALL}, SHAPE, Setup()),
    "lora, layers computed again": ({"rates": BOTH, "lora": Lora(rank=8), "checkpointing": True}, SHAPE, Setup()),
    "many images, qwen2, bfloat16": (
        {"family": "qwen2", "dtype": torch.bfloat16},
        Shape(4, 128, 100, 40),
        Setup(mixed_precision="bf16"),
    ),
    "autocast over float32": ({}, SHAPE, Setup(mixed_precision="bf16")),
    "qformer": ({"connector": QFORMER}, Shape(1, 256, 40, 60), Setup()),
    "qformer that reads the question": (
        {"connector": replace(QFORMER, instruct=True)},
        Shape(1, 256, 40, 60),
        Setup(),
    ),
    "many supervised": ({"vocab_size": 16000}, Shape(2, 256, 4, 400), Setup()),
    "eager attention": ({"attention": "eager"}, SHAPE, Setup()),
    "align, images of a step together": (
        {"groups": Groups(40, filled=False), "connector": LinearConnector()},
        Shape(1, 96, 12, 20),
        Setup(accumulation=4),
    ),
    "the same, over bfloat16": (
        {"groups": Groups(40, filled=False), "dtype": torch.bfloat16},
        Shape(1, 128, 12, 20),
        Setup(accumulation=4, mixed_precision="bf16"),
    ),
    "text alone": ({}, Shape(2, 256, 0, 60), Setup()),
}


@pytest.mark.parametrize("case", CASES)
def test_predicted_peak_is_within_a_tenth_of_the_allocators(case: str) -> None:
    options, shape, setup = CASES[case]
    model = model_of(**options)
    predicted = predict(model, shape, setup)
    step, standing = step_of(model, shape, setup)
    measured = standing + allocated(step)
    print(f"{case}: predicted {predicted.peak / 1e6:.2f} MB, measured {measured / 1e6:.2f} MB, {predicted.parts}")
    assert measured > 5e6  # some megabytes, so that a tenth is not a rounding error
    assert predicted.peak == pytest.approx(measured, rel=0.10)
    if "update" in case:
        assert predicted.moment == "update"


def test_features_that_wait_for_their_micro_batch_are_counted() -> None:
    """A group of 360 images beside micro-batches of 12: what it adds is told, and nearly so much is added."""
    shape, setup = Shape(1, 96, 12, 20), Setup(accumulation=30)
    predicted, measured = [], []
    for groups in (Groups(500, filled=False), None):
        model = model_of(groups=groups, dtype=torch.bfloat16)
        predicted.append(predict(model, shape, setup).peak)
        step, standing = step_of(model, shape, setup)
        measured.append(standing + allocated(step))
    features = 360 * 4 * 24 * 2  # images, patches, width, bytes
    assert predicted[0] - predicted[1] >= features
    assert predicted[0] - predicted[1] == pytest.approx(measured[0] - measured[1], rel=0.10)


def on_rank(rank: int, engine: str, folder: Path) -> None:
    """All that is alive on a rank at the peak of its third step, from before the engine got the model."""
    accelerator, model = start(engine, folder, "no"), model_of(BOTH)
    train = settings(folder, rows_per_step=2 * SHAPE.rows, rows_per_micro_batch=SHAPE.rows)
    zero.settle(accelerator, train, 1)
    groups, make = parameter_groups(model, ALL, 0.0), partial(make_optimizer, name="adamw")
    batch = made_up(model, SHAPE, VISUAL_TOKENS)
    with Tracker() as tracker:
        for tensor in (*model.parameters(), *model.buffers(), *filter(torch.is_tensor, batch.values())):
            tracker.count(tensor, "there")
        objective, optimizer, _ = prepare(accelerator, NextToken(model), groups, make)
        for number in range(3):
            with tracker.during(f"step {number}"):
                optimise(accelerator, objective, optimizer, [batch], max_grad_norm=1.0)
    if rank == 0:
        (folder / "setup.json").write_text(json.dumps([setup_of(accelerator, train).bucket, tracker.highest["step 2"]]))
    torch.distributed.destroy_process_group()


ENGINES = ["ddp", *(pytest.param(f"zero{stage}", marks=pytest.mark.long) for stage in (1, 2, 3))]


@pytest.mark.parametrize("engine", ENGINES)
def test_predicted_peak_is_within_a_tenth_on_two_ranks(tmp_path: Path, engine: str) -> None:
    stage = int(engine[4:] or 0) if engine != "ddp" else 0
    if stage:
        pytest.importorskip("deepspeed", reason="deepspeed is not installed: pip install 'mllm[deepspeed]'")
        small = {"reduce_bucket_size": 300_000, "stage3_prefetch_bucket_size": 300_000}  # less than the model
        config = json.loads((CONFIGS / f"{engine}.json").read_text())
        chosen = config["zero_optimization"]
        chosen |= {key: value for key, value in small.items() if key in chosen}
        (tmp_path / f"{engine}.json").write_text(json.dumps(config))
    on_two_ranks(on_rank, engine, tmp_path)
    bucket, measured = json.loads((tmp_path / "setup.json").read_text())
    predicted = predict(model_of(BOTH), SHAPE, Setup(ranks=2, stage=stage, bucket=bucket))
    print(f"{engine}: predicted {predicted.peak / 1e6:.2f} MB, measured {measured / 1e6:.2f} MB, {predicted.parts}")
    assert predicted.peak == pytest.approx(measured, rel=0.10)


def test_tracker_sees_what_the_allocator_gives() -> None:
    """Two ways to one number, on the same real step."""
    model = model_of(BOTH)
    step, _ = step_of(model, SHAPE, Setup())
    told = allocated(step)
    with Tracker([*model.parameters(), *model.buffers()]) as tracker:
        step()
    assert tracker.peak == pytest.approx(told, rel=0.03)


def test_prediction_leaves_the_model_and_the_random_numbers_as_they_were() -> None:
    model = model_of(BOTH, Lora(rank=8, dropout=0.1), checkpointing=True)
    before = {name: (p.data_ptr(), p.requires_grad, p.grad) for name, p in model.named_parameters()}
    state = torch.get_rng_state()
    predict(model, SHAPE, Setup())
    assert {name: (p.data_ptr(), p.requires_grad, p.grad) for name, p in model.named_parameters()} == before
    assert torch.equal(torch.get_rng_state(), state)


def test_a_model_without_data_is_predicted_like_a_real_one() -> None:
    real = model_of(BOTH, Lora(rank=8))
    bare = copy.deepcopy(real).to("meta")
    assert predict(bare, SHAPE, Setup()) == predict(real, SHAPE, Setup())


def test_gradient_checkpointing_moves_the_peak_down_and_the_parts_are_named() -> None:
    whole, again = predict(model_of(), SHAPE, Setup()), predict(model_of(checkpointing=True), SHAPE, Setup())
    assert again.peak < whole.peak
    assert again.parts["activations"] < whole.parts["activations"] / 3
    assert set(whole.phases) == {"encoder", "forward", "loss", "backward", "update"}
    assert whole.peak == max(whole.phases.values())


def dealt(model: MultimodalLM, **changes: Any) -> Memory:
    return predict(model, SHAPE, replace(Setup(ranks=4, stage=1), **changes))


def test_stages_deal_moments_then_gradients_then_weights() -> None:
    model = model_of(BOTH)
    weights = sum(p.numel() for p in model.parameters()) * 4
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad) * 4
    plain = predict(model, SHAPE, Setup(ranks=4, accumulation=2))  # gradients lie there from one pass to the next
    assert plain.parts["moments"] == 2 * trained
    assert plain.parts["buckets"] == trained  # DDP
    one, two, three = (dealt(model, stage=stage, accumulation=2) for stage in (1, 2, 3))
    assert one.parts["moments"] == 3 * trained // 4  # with the copy that DeepSpeed steps
    assert two.parts.get("gradients", 0) <= one.parts["gradients"] // 4 + 1
    assert three.parts["weights"] < weights / 2 < two.parts["weights"]
    assert dealt(model, stage=2, offload_moments=True).parts.get("moments") is None
    assert three.peak < two.peak < one.peak < plain.peak


TWO = Setup(ranks=2, bucket=1000)  # ZeRO's own buckets are larger than these models


@pytest.fixture(scope="module")
def tried() -> Iterator[dict[str, int]]:
    model = model_of(BOTH)
    before = predict(model, SHAPE, TWO).peak
    found = {lever.change: lever.peak for lever in levers(model, SHAPE, TWO)}
    assert all(peak < before for peak in found.values())
    assert predict(model, SHAPE, TWO).peak == before  # nothing stays pulled
    return found


def test_levers_are_named_as_settings_with_their_peak(tried: dict[str, int]) -> None:
    said = " ".join(tried)
    for words in (
        "rows_per_micro_batch 1",
        "gradient_checkpointing",
        "ZeRO stage 2",
        "ZeRO stage 3",
        "lora",
        "seq_length",
    ):
        assert words in said


def test_a_lever_tells_the_peak_of_a_run_that_pulled_it(tried: dict[str, int]) -> None:
    pulled = predict(model_of(BOTH, checkpointing=True), SHAPE, TWO).peak
    assert tried["train.gradient_checkpointing true"] == pulled


def test_bfloat16_weights_are_a_lever_where_frozen_ones_are_float32() -> None:
    found = {lever.change: lever.peak for lever in levers(model_of(), SHAPE, Setup(mixed_precision="bf16"))}
    half = model_of(dtype=torch.bfloat16)
    assert found["model.dtype bfloat16"] == pytest.approx(
        predict(half, SHAPE, Setup(mixed_precision="bf16")).peak, rel=0.01
    )


def test_an_llm_that_does_not_run_without_data_is_told_in_words_and_left_as_it_was(capfd: Any) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 64}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4}
    model = model_of()
    model.connector = MLPConnector().build(model.vision_encoder.width, 32, model.vision_encoder.num_patches)
    model.llm = AutoModelForCausalLM.from_config(MixtralConfig(**sizes, **heads))
    choose_trainable(model, BOTH, Lora(rank=2))
    before = dict(model.named_parameters())
    with pytest.raises(NotImplementedError, match="does not run without data"):
        predict(model, SHAPE, Setup(torch.device("cpu")))
    after = dict(model.named_parameters())
    assert list(after) == list(before)
    assert all(after[name] is weight for name, weight in before.items())
    assert model.llm(input_ids=torch.zeros(1, 4, dtype=torch.long)).logits.isfinite().all()
    said = capfd.readouterr()
    assert "Traceback" not in said.out + said.err
