"""Frozen weights as 8-bit floats: the arithmetic, on a CPU with the same numbers, and who is refused."""

from __future__ import annotations

import json
import math
import shutil
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from conftest import make_model, make_processor, make_sample, write_llava
from mllm.data.collate import collate
from mllm.data.packing import join
from mllm.models.multimodal import MultimodalLM
from mllm.train.forecasting.memory import predict
from mllm.train.forecasting.shadow import Setup, Shape
from mllm.train.losses import NextToken, model_inputs
from mllm.train.trainable import LearningRates, Lora, choose_trainable
from mllm.train.tuning import fp8, fp8_gate
from mllm.train.tuning.fp8 import FrozenFp8Linear, bytes_of_copies, chosen, convert, product, quantise
from mllm.train.tuning.fp8_gate import FILE, Choice, choices
from runs import metrics, on_two_ranks, run, settings


def aligned(lora: Lora | None = None, family: str = "llama") -> MultimodalLM:
    rates = LearningRates(connector=1e-2, llm=1e-2 if lora else None)
    model = make_model(family)
    choose_trainable(model, rates, lora)
    return model


def test_every_row_keeps_four_significant_bits_whatever_its_size() -> None:
    draw = torch.Generator().manual_seed(0)
    matrix = torch.randn(40, 64, generator=draw) * torch.logspace(-20, 4, 40)[:, None]
    eight, scale = quantise(matrix)
    assert eight.dtype == torch.float8_e4m3fn
    back, largest = eight.float() * scale, matrix.abs().amax(1, keepdim=True)
    assert ((back - matrix).abs() <= matrix.abs() / 16 + largest / 2**17).all()
    torch.testing.assert_close(back.abs().amax(1, keepdim=True), largest, rtol=1e-6, atol=0)


def test_a_row_of_zeros_stays_one() -> None:
    eight, scale = quantise(torch.zeros(2, 16))
    assert not eight.float().any()
    assert (scale > 0).all()


def test_product_and_gradient_are_those_of_the_full_weights_but_for_three_bits() -> None:
    torch.manual_seed(0)
    plain = nn.Linear(64, 48).requires_grad_(False)
    eight = nn.Linear(64, 48).requires_grad_(False)
    eight.load_state_dict(plain.state_dict())
    model = SimpleNamespace(llm=Wrapped(eight))
    assert convert(model) == 1  # type: ignore[arg-type]
    one, two = (torch.randn(3, 50, 64, generator=torch.Generator().manual_seed(1)).requires_grad_() for _ in range(2))
    torch.testing.assert_close(plain(one), eight(two), rtol=0.1, atol=0.1)
    gradient = torch.randn(3, 50, 48)
    plain(one).backward(gradient)
    eight(two).backward(gradient)
    assert cosine(one.grad, two.grad) > 0.999


class Wrapped(nn.Module):
    """The least that `convert` takes for an LLM."""

    _no_split_modules = None

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.layer = layer

    def get_output_embeddings(self) -> None:
        return None


def cosine(one: Any, other: Any) -> float:
    return float(nn.functional.cosine_similarity(one.flatten().double(), other.flatten().double(), dim=0))


def test_product_is_the_one_of_the_dequantised_matrices() -> None:
    torch.manual_seed(0)
    weight, states = torch.randn(32, 16), torch.randn(2, 5, 16)
    eight, scale = quantise(weight)
    rows, row_scale = quantise(states.view(-1, 16))
    expected = (rows.float() * row_scale) @ (eight.float() * scale).t()
    torch.testing.assert_close(product(states, eight, scale), expected.view(2, 5, 32), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("lora", [None, Lora(rank=4)], ids=["frozen", "lora"])
def test_frozen_layers_of_the_llm_are_converted_and_nothing_else(lora: Lora | None) -> None:
    model = aligned(lora)
    weights = {name: p.clone() for name, p in model.named_parameters()}
    assert convert(model) == 2 * 7
    kinds = {type(m) for m in model.vision_encoder.modules()} | {type(m) for m in model.connector.modules()}
    assert FrozenFp8Linear not in kinds
    assert type(model.llm.get_output_embeddings()) is nn.Linear
    assert all(not m.weight.requires_grad for m in model.modules() if isinstance(m, FrozenFp8Linear))
    assert weights.keys() == dict(model.named_parameters()).keys() == weights.keys()
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())
    assert {name for name, _ in model.named_buffers()} == {name for name, _ in aligned(lora).named_buffers()}


def test_both_copies_are_foreseen() -> None:
    model = aligned()
    found, foreseen = chosen(model), bytes_of_copies(model)
    shape = Shape(rows=1, length=64, images=2, supervised=9)
    plain, eight = (predict(model, shape, Setup(fp8=on)).parts["weights"] for on in (False, True))
    assert eight - plain == foreseen
    convert(model)
    held = [tensor for layer in found for pair in (layer.forwards, layer.backwards) for tensor in pair]
    assert sum(tensor.nbytes for tensor in held) == foreseen


def test_a_later_training_has_its_own_copies_or_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fp8, "check", lambda *_: None)
    model, plain = aligned(), aligned()
    switch = partial(fp8.switch_on, Accelerator(cpu=True), model)
    switch(settings(Path("x"), fp8=True))
    for one in (model, plain):
        one.llm.model.layers[0].mlp.down_proj.weight.data.mul_(2)
    switch(settings(Path("x"), fp8=True))
    assert torch.equal(chosen_first(model).forwards[1], quantise(chosen_first(plain).weight)[1])
    switch(settings(Path("x")))
    assert not any(isinstance(module, FrozenFp8Linear) for module in model.modules())
    assert all(torch.equal(*pair) for pair in zip(gradient_of(model), gradient_of(plain), strict=True))


def of_first_block(first: tuple[bool, bool], others: tuple[bool, bool] = (False, False)) -> Any:
    return lambda name, block: others if block else first


@pytest.mark.parametrize("eight", [(True, False), (False, True), (True, True)], ids=["product", "gradient", "both"])
def test_product_and_gradient_are_chosen_each_for_itself_block_by_block(eight: tuple[bool, bool]) -> None:
    model, plain = aligned(), aligned()
    assert convert(model, of_first_block(eight)) == 7
    assert fp8.share(model, of_first_block(eight)) == sum(eight) / 4
    own, other = (one.llm.model.layers[0].mlp.down_proj for one in (model, plain))
    assert type(own) is FrozenFp8Linear
    assert type(model.llm.model.layers[1].mlp.down_proj) is nn.Linear
    torch.manual_seed(0)
    states, upstream = torch.randn(9, 64, requires_grad=True), torch.randn(9, 32)
    found, expected = own(states), other(states)
    assert torch.equal(found, expected) is not eight[0]
    gradients = [torch.autograd.grad(out, states, upstream)[0] for out in (found, expected)]
    assert torch.equal(*gradients) is not eight[1]
    assert cosine(found, expected) > 0.998
    assert cosine(*gradients) > 0.998


@pytest.mark.parametrize("eight", [(False, True), (True, True)], ids=["gradient", "both"])
def test_compiled_blocks_compute_what_they_do_uncompiled(eight: tuple[bool, bool]) -> None:
    found = []
    for compiled in (False, True):
        model = aligned()
        convert(model, of_first_block(eight, (True, True)))
        for block in model.llm.model.layers if compiled else ():
            block.mlp.forward = torch.compile(block.mlp.forward, backend="aot_eager", fullgraph=True)
        found.append(torch.cat([gradient.flatten() for gradient in gradient_of(model)]))
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-7)


def chosen_first(model: MultimodalLM) -> Any:
    return model.llm.model.layers[0].mlp.down_proj


def test_what_is_asked_without_a_gradient_comes_from_the_weights_as_they_are() -> None:
    model, plain = aligned(), aligned()
    convert(model)
    ids = torch.arange(8, 20)[None]
    pixels = torch.zeros(1, 3, 28, 28)
    with torch.no_grad():
        assert torch.equal(*(one(ids, torch.arange(12)[None], pixels, 0) for one in (model, plain)))


@pytest.mark.parametrize("kind", ["align", "lora"])
def test_losses_of_a_run_stay_within_half_a_percent(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fp8, "check", lambda *_: None)  # a CPU computes with the same numbers, and is refused else
    lora = Lora(rank=4) if kind == "lora" else None
    rates = LearningRates(connector=1e-2, llm=3e-3 if lora else None)
    data, losses = write_llava(tmp_path), {}
    for name in ("plain", "fp8"):
        train = settings(tmp_path / name, learning_rate=rates, lora=lora, steps=6, fp8=name == "fp8")
        torch.manual_seed(5)
        run(data, train, aligned(lora))
        losses[name] = [loss for (loss,) in metrics(train.output_dir, "loss")]
    assert losses["fp8"] != losses["plain"]
    assert losses["plain"][-1] < losses["plain"][0] - 0.01  # something was learned
    assert losses["fp8"] == pytest.approx(losses["plain"], rel=5e-3)


def test_each_choice_is_a_part_of_the_one_before() -> None:
    deep = choices(28)
    assert [(one.products_from, one.gradients_from) for one in deep] == [
        (0, 0),
        (4, 0),
        (7, 0),
        (14, 0),
        (28, 0),
        (28, 14),
    ]
    assert choices(2) == [Choice(), Choice(1), Choice(2), Choice(2, 1)]
    assert [one.words(2) for one in choices(2)] == [
        "all",
        "products from block 2 of 2 on and all gradients",
        "all gradients",
        "gradients from block 2 of 2 on",
    ]
    assert [fp8.share(aligned(), one.which) for one in choices(2)] == [1, 0.75, 0.5, 0.25]


@pytest.mark.parametrize(
    ("family", "furthest", "wanted"),
    [("llama", 0.01, Choice()), ("gemma3", 0.01, Choice(1)), ("llama", 1e-6, Choice(2))],
    ids=["all", "direction", "loss"],
)
def test_products_stay_as_they_are_until_direction_and_loss_are_kept(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    family: str,
    furthest: float,
    wanted: Choice,
) -> None:
    """All of Gemma 3 with weights at random, of this width, has a cosine of 0.987."""
    monkeypatch.setattr(fp8, "check", lambda *_: None)
    monkeypatch.setattr(fp8_gate, "FURTHEST", furthest)
    train, model = settings(tmp_path / "out", fp8=True, steps=1), aligned(family=family)
    run(write_llava(tmp_path), train, model)
    layers = [layer.mlp.down_proj for layer in model.llm.model.layers]
    assert [layer.forwards is None for layer in layers] == [block < wanted.products_from for block in (0, 1)]
    assert all(layer.backwards for layer in layers)
    share = 1 - wanted.products_from / 4
    kept = json.loads((train.output_dir / FILE).read_text())
    assert kept["cosine"] > 0.99
    assert abs(kept["loss"]) <= furthest
    known = {"products_from": wanted.products_from, "gradients_from": 0, "blocks": 2, "share": share}
    assert {name: kept[name] for name in known} == known
    said = capsys.readouterr().out
    assert (
        f"fp8: {wanted.words(2)}, {share:.0%} of the frozen layers' operations; the gradient of the first row" in said
    )
    assert f"has a cosine of {kept['cosine']:.4f} to that of the weights as they are" in said


@pytest.mark.parametrize(
    ("cosine", "loss", "enough"),
    [(0.99, 0.0, True), (0.9899, 0.0, False), (1.0, -0.0011, False), (1.0, 0.0009, True), (math.nan, 0.0, False)],
)
def test_direction_and_loss_are_asked_for_both(cosine: float, loss: float, enough: bool) -> None:
    assert fp8_gate.Kept(cosine, loss).enough is enough


def test_where_nothing_keeps_the_direction_the_run_ends_with_the_cosine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fp8, "check", lambda *_: None)
    monkeypatch.setattr(fp8_gate, "LEAST", 0.99999)
    data, train = write_llava(tmp_path), settings(tmp_path / "out", fp8=True, steps=1)
    said = (
        r"more than gradients from block 2 of 2 on .* cosine of 0\.999\d .* 0\.99999 .* asked for: leave train\.fp8 out"
    )
    with pytest.raises(ValueError, match=said):
        run(data, train)
    train.probe = False
    run(data, train, model := aligned())
    assert all(layer.forwards and layer.backwards for layer in model.modules() if isinstance(layer, FrozenFp8Linear))


def test_a_resumed_run_computes_as_it_began_and_does_not_ask_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(fp8, "check", lambda *_: None)
    monkeypatch.setattr(fp8_gate, "FURTHEST", 0.01)
    data, whole, cut = write_llava(tmp_path), settings(tmp_path / "whole", fp8=True), tmp_path / "cut"
    run(data, whole, aligned(family="gemma3"))
    run(data, settings(cut, fp8=True, save_every=2), aligned(family="gemma3"))
    shutil.rmtree(cut / "checkpoints" / "step-4")
    (cut / "metrics.jsonl").write_text("".join((cut / "metrics.jsonl").read_text().splitlines(keepends=True)[:2]))
    before = (cut / FILE).read_text()
    monkeypatch.setattr(fp8_gate, "first_that_keeps", lambda *_: pytest.fail("asked again"))
    capsys.readouterr()
    run(data, settings(cut, fp8=True, save_every=2), aligned(family="gemma3"), resume=True)
    assert metrics(cut) == metrics(whole.output_dir)
    assert (cut / FILE).read_text() == before
    assert "fp8, as the run began: products from block 2 of 2 on and all gradients, 75%" in capsys.readouterr().out


def test_two_ranks_take_what_the_worse_of_them_needs(tmp_path: Path) -> None:
    on_two_ranks(as_seen_by, tmp_path)
    found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    assert found[0] == found[1]
    assert found[0][:2] == [1, pytest.approx(0.992)]


def as_seen_by(rank: int, folder: Path) -> None:
    """All in 8 bits keeps the direction of rank 0 alone; the second choice that of both. Losses are not asked for."""
    seen = iter(([0.999, 0.998], [0.98, 0.992])[rank])
    fp8_gate.cosine_similarity = lambda *_, dim: torch.tensor(next(seen))  # type: ignore[assignment]
    fp8_gate.FURTHEST = 1.0
    processor = make_processor()
    row = collate([join([processor(make_sample(rank))], processor.pixel_shape)], processor.pixel_shape)
    found, kept = fp8_gate.first_that_keeps(Accelerator(cpu=True), aligned(), [row], choices(2))
    (folder / f"{rank}.json").write_text(json.dumps([found.products_from, kept.cosine, kept.loss]))
    torch.distributed.destroy_process_group()


def test_asking_for_the_direction_changes_no_bit_of_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fp8, "check", lambda *_: None)
    data, found = write_llava(tmp_path), []
    for probe in (True, False):
        train = settings(tmp_path / str(probe), fp8=True, steps=2, probe=probe)
        run(data, train, aligned())
        found.append(metrics(train.output_dir))
    assert found[0] == found[1]


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_gradient_of_the_connector_has_the_direction_of_the_full_one(family: str) -> None:
    found = []
    for eight in (False, True):
        model = aligned(family=family)
        if eight:
            assert convert(model)
        gradients = gradient_of(model)
        found.append(torch.cat([gradient.flatten() for gradient in gradients]))
    assert cosine(*found) > 0.99
    assert not torch.equal(*found)


def gradient_of(model: MultimodalLM) -> list[torch.Tensor]:
    processor = make_processor()
    examples = [processor(make_sample(i, num_images=1 + i % 2)) for i in range(4)]
    batch = collate([join(examples, processor.pixel_shape)], processor.pixel_shape)
    NextToken(model)(**model_inputs(batch, torch.device("cpu"))).backward()
    return [p.grad for p in model.connector.parameters() if p.grad is not None]


CUDA = torch.device("cuda")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"learning_rate": LearningRates(llm=1e-3)}, "trains the LLM"),
        ({"mixed_precision": "no"}, "set train.mixed_precision to bf16"),
    ],
)
def test_what_it_cannot_do_is_refused(changes: dict[str, Any], said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fp8, "refuse_device", lambda device: None)
    train = settings(Path("x"), **{"mixed_precision": "bf16", "fp8": True, **changes})
    with pytest.raises(ValueError, match=said):
        fp8.check(Accelerator(cpu=True), aligned(), train)


def test_a_device_without_such_numbers_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="and this is a cpu: leave it out"):
        run(write_llava(tmp_path), settings(tmp_path / "out", fp8=True, mixed_precision="bf16"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A100")
    with pytest.raises(ValueError, match=r"A100 has 8\.0"):
        fp8.refuse_device(CUDA)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    fp8.refuse_device(CUDA)
