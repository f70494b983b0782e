"""On CUDA devices: what the CPU tests prove in float32 holds in bfloat16 too, and every engine trains the same run.

    python -m pytest -rs -n 4 tests/test_gpu.py

That is all that needs a device; four processes share it, since the runs under engines, each started by `accelerate
launch`, mostly import. What needs two devices (NCCL refuses two ranks on one), or DeepSpeed, is skipped without, and
`-rs` says so. DeepSpeed builds nothing here: the optimiser is torch's, also where it is offloaded. The runs are
rehearsed on a CPU by `tests/long/test_gpu_rehearsal.py`.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from accelerate import Accelerator
from torch._dynamo.utils import counters

from conftest import LLM_CONFIGS, make_model, make_processor, make_sample, picture, write_llava
from mllm import reload
from mllm.data.collate import collate
from mllm.data.loader import DataConfig
from mllm.data.packing import join
from mllm.decoding.recorded import RecordedGreedy
from mllm.generate import Assistant
from mllm.models.connectors import AvgPoolConnector, MLPConnector
from mllm.models.feature_cache import FeatureCache
from mllm.models.feature_folder import FeatureFolder
from mllm.models.packed import kernels
from mllm.models.packed.boundaries import boundaries
from mllm.models.packed.choice import check_attention, implementation
from mllm.models.packed.function import register
from mllm.models.stored_features import StoredFeatures
from mllm.train.inputs import StepInputs, inputs_of
from mllm.train.losses import NextToken, model_inputs
from mllm.train.settings import TrainConfig
from mllm.train.step import optimise
from mllm.train.trainable import LearningRates, Lora, choose_trainable, parameter_groups, set_mode
from mllm.train.tuning import compiling, fast_lora
from mllm.types import Batch, Example, Message
from runs import metrics, run, settings
from test_conversation import turns
from test_generate import sharp

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
SHAPE = (3, 28, 28)


def batch_of(groups: list[list[Example]]) -> Batch:
    return collate([join(group, SHAPE) for group in groups], SHAPE)


def loss_and_gradient(model: torch.nn.Module, batches: list[Batch]) -> tuple[float, torch.Tensor]:
    objective = NextToken(model)
    objective.zero_grad()
    device = torch.device("cuda")
    loss = torch.stack([objective(**model_inputs(batch, device)) for batch in batches]).sum()
    loss.backward()
    return float(loss.detach()), torch.cat([p.grad.flatten().float() for p in model.connector.parameters()])


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_packed_equals_separate_in_bfloat16_on_the_device(family: str, attention: str) -> None:
    processor = make_processor()
    examples = [processor(make_sample(i, num_images=i % 3, turns=1 + i % 2)) for i in range(5)]
    model = make_model(family, attention).to("cuda", torch.bfloat16)
    packed_loss, packed = loss_and_gradient(model, [batch_of([examples])])
    separate_loss, separate = loss_and_gradient(model, [batch_of([[example]]) for example in examples])
    assert packed_loss == pytest.approx(separate_loss, rel=5e-3)
    assert torch.nn.functional.cosine_similarity(packed, separate, dim=0) > 0.99


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_entropy_kernel_gives_the_losses_and_the_gradient_of_torchs_own(dtype: torch.dtype, tolerance: float) -> None:
    pytest.importorskip("triton")
    from mllm.train.kernels.entropy import entropy_in_place

    torch.manual_seed(0)
    for rows, words in ((1, 5), (7, 4096), (33, 10_001)):
        logits = (4 * torch.randn(rows, words, device="cuda")).to(dtype).requires_grad_()
        targets, weights = torch.randint(0, words, (rows,), device="cuda"), torch.rand(rows, device="cuda")
        losses = torch.nn.functional.cross_entropy(logits.float(), targets, reduction="none")
        (expected,) = torch.autograd.grad(losses, logits, weights)
        found = logits.detach().clone()
        torch.testing.assert_close(entropy_in_place(found, targets, weights), losses.detach(), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=1e-7)


@pytest.mark.skipif(torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 9), reason="no 8-bit floats")
def test_eight_bit_product_is_that_of_the_dequantised_matrices_and_of_a_cpu() -> None:
    from mllm.train.kernels.rows_to_fp8 import rows_to_fp8
    from mllm.train.tuning.fp8 import product, quantise

    torch.manual_seed(0)
    states, weight = (
        torch.randn(3, 50, 1040, device="cuda").bfloat16(),
        torch.randn(160, 1040, device="cuda").bfloat16(),
    )
    eight, scale = rows_to_fp8(weight)
    on_cpu, scale_there = quantise(weight.cpu())
    torch.testing.assert_close(scale.cpu(), scale_there, rtol=1e-6, atol=0)
    assert (eight.cpu().float() == on_cpu.float()).float().mean() > 0.999  # but for ties at the last bit of the scale
    rows, row_scale = rows_to_fp8(states.view(-1, 1040))
    expected = (rows.float() * row_scale) @ (eight.float() * scale).t()
    found = product(states, eight, scale)
    assert (found.shape, found.dtype) == ((3, 50, 160), torch.bfloat16)
    assert (found.view(-1, 160).float() - expected).norm() < 1e-2 * expected.norm()


@pytest.mark.skipif(torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 9), reason="no 8-bit floats")
def test_gradient_through_eight_bit_layers_has_the_direction_of_the_full_one() -> None:
    from mllm.train.tuning.fp8 import convert

    processor, found = make_processor(), []
    batch = batch_of([[processor(make_sample(i)) for i in range(4)]])
    for eight in (False, True):
        model = make_model().to("cuda", torch.bfloat16)
        model.llm.requires_grad_(False)
        assert not eight or convert(model) == 14
        found.append(loss_and_gradient(model, [batch]))
    assert found[1][0] == pytest.approx(found[0][0], rel=5e-3)
    assert torch.nn.functional.cosine_similarity(found[0][1], found[1][1], dim=0) > 0.99


KERNEL_FAMILIES = [family for family in LLM_CONFIGS if family != "gemma2"]
register()


@pytest.mark.parametrize("window", [None, 16])
@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize(("heads", "groups", "width"), [(8, 8, 64), (8, 2, 64), (12, 2, 128), (4, 1, 8)])
def test_varlen_gives_the_output_and_the_gradients_of_the_reference(
    heads: int, groups: int, width: int, scale: float | None, window: int | None
) -> None:
    made = boundaries(torch.cat([torch.arange(length) for length in (37, 1, 300, 5, 169)])[None])
    drawn = torch.Generator("cuda").manual_seed(0)
    query, key, value, upstream = (
        torch.randn(512, n, width, device="cuda", generator=drawn).bfloat16() for n in (heads, groups, groups, heads)
    )
    found = []
    for kernel, dtype in ((kernels.varlen, torch.bfloat16), (kernels.reference, torch.float32)):
        given = [part.detach().to(dtype).requires_grad_() for part in (query, key, value)]
        out = kernel(*given, made.starts.cuda(), made.longest, scale or width**-0.5, window)
        found.append([out.detach(), *torch.autograd.grad(out, given, upstream.to(dtype))])
    for ours, exact in zip(*found, strict=True):
        assert (ours.float() - exact).norm() <= 0.01 * exact.norm()


@pytest.mark.parametrize("family", KERNEL_FAMILIES)
def test_packed_by_varlen_equals_separate_by_sdpa_on_the_device(family: str) -> None:
    processor = make_processor()
    examples = [processor(make_sample(i, num_images=i % 3, turns=1 + i % 2)) for i in range(5)]
    # a window wider than a sample, so that answers see their images, and narrower than a row
    window = {"sliding_window": 64} if "sliding_window" in LLM_CONFIGS[family][1] else {}
    ours, own = (make_model(family, name, **window).to("cuda", torch.bfloat16) for name in ("mllm_varlen", "sdpa"))
    packed_loss, packed = loss_and_gradient(ours, [batch_of([examples[:3], examples[3:]])])
    separate_loss, separate = loss_and_gradient(own, [batch_of([[example]]) for example in examples])
    assert packed_loss == pytest.approx(separate_loss, rel=5e-3)
    assert torch.nn.functional.cosine_similarity(packed, separate, dim=0) > 0.99


def test_auto_is_varlen_on_a_device_that_has_it() -> None:
    model = make_model()
    assert implementation("auto", model.llm.config) == "mllm_varlen"
    check_attention("varlen", make_model(attention="mllm_varlen").llm, torch.device("cuda"))


def step_on_device(compiled: bool, blocks: list[list[Batch]]) -> tuple[list[float], list[int]]:
    """Losses of a step each, and the graphs that there were behind it."""
    torch._dynamo.reset()
    counters.clear()
    accelerator, rates = Accelerator(mixed_precision="bf16"), LearningRates(connector=1e-3)
    model, seen = make_model("mistral", "mllm_varlen"), []
    choose_trainable(model, rates, None)
    compiling.switch_on(accelerator, model, TrainConfig(Path("unused"), compile=compiled), DataConfig())
    set_mode(model)
    optimizer = torch.optim.SGD(parameter_groups(model, rates, 0.0))
    objective, optimizer = accelerator.prepare(NextToken(model), optimizer)
    losses = []
    for block in blocks:
        losses.append(optimise(accelerator, objective, optimizer, block, 1.0)["loss"])
        seen.append(counters["stats"]["unique_graphs"])
    return losses, seen


def test_compiled_blocks_have_the_same_losses_and_are_compiled_once() -> None:
    processor = make_processor()

    def batch(*numbers: int) -> Batch:
        examples = [processor(make_sample(n, n % 3, turns=1 + n % 2)) for n in numbers]
        return collate([join(examples, SHAPE)], SHAPE, 256)

    blocks = [[batch(1, 2), batch(0)], [batch(4), batch(2, 2, 1)], [batch(0, 3), batch(5)], [batch(2), batch(1)]]
    plain, _ = step_on_device(False, blocks)
    compiled, seen = step_on_device(True, blocks)
    assert compiled == pytest.approx(plain, rel=1e-2)
    assert seen == [seen[0]] * len(blocks)
    assert seen[0] > 0


def test_forward_and_backward_never_wait_for_the_device() -> None:
    model, device = make_model("mistral", "mllm_varlen").to("cuda", torch.bfloat16), torch.device("cuda")
    examples = [make_processor()(make_sample(i, num_images=i % 3)) for i in range(4)]
    inputs = inputs_of(batch_of([examples]), device, model, "token")
    objective = NextToken(model)
    objective(**inputs).backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        objective(**inputs).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_memory_is_foretold_without_the_loss_kernel() -> None:
    """Tensors without data have no address that a kernel could be given."""
    from mllm.train.forecasting.memory import predict
    from mllm.train.forecasting.shadow import Setup, Shape

    model = make_model().requires_grad_(False)
    model.connector.requires_grad_(True)
    shape = Shape(rows=1, length=64, images=1, supervised=9)
    assert predict(model, shape, Setup(device=torch.device("cuda"))).phases["loss"] > 0


def test_float32_loss_on_the_device_equals_the_loss_on_the_cpu() -> None:
    processor, model = make_processor(), make_model()
    batch = batch_of([[processor(make_sample(i)) for i in range(4)]])
    on_cpu = float(NextToken(model)(**model_inputs(batch, torch.device("cpu"))).detach())
    on_device, _ = loss_and_gradient(model.to("cuda"), [batch])
    assert on_device == pytest.approx(on_cpu, rel=1e-4)


def test_uint8_pixels_are_normalised_on_the_device_as_on_the_cpu() -> None:
    encoder = make_model().vision_encoder
    drawn = torch.randint(0, 256, (2, 3, 28, 28), generator=torch.Generator().manual_seed(0))
    pixels = drawn.to(torch.uint8)
    on_cpu = encoder.normalised(pixels)
    on_device = encoder.to("cuda").normalised(pixels.to("cuda"))
    assert (on_device.device.type, on_device.dtype) == ("cuda", torch.float32)
    torch.testing.assert_close(on_device.cpu(), on_cpu, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_audit_s_question_has_the_same_answer_on_the_device_and_on_the_cpu(dtype: torch.dtype) -> None:
    """A stage that a device trained is read back on the CPU."""
    model, processor = make_model().to(dtype).eval(), make_processor()
    on_cpu = reload.probe(model, processor, torch.device("cpu"))
    on_device = reload.probe(model.to("cuda"), processor, torch.device("cuda"))
    assert reload.difference(on_device, on_cpu) <= reload.TOLERANCE[dtype]


@pytest.mark.parametrize("decoding", ["recorded", "compiled"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen2_sliding", "qwen3", "gemma2", "gemma3", "mistral"])
def test_answers_from_recorded_kernels_are_the_ordinary_ones(family: str, decoding: Any) -> None:
    attention = "eager" if family == "gemma2" else "sdpa"
    model = sharp(make_model(family, attention)).to("cuda")
    quick, ordinary = (Assistant(model, make_processor(), way) for way in (decoding, "ordinary"))
    for talk in turns(picture(1), picture(2)):
        answer = "".join(ordinary.stream(talk, 24))
        assert "".join(quick.stream(talk, 24)) == answer
        talk.messages.append(Message("assistant", [answer.strip()]))
    assert isinstance(quick.greedy, RecordedGreedy)
    assert quick.greedy.refused == ""
    assert quick.greedy.prefilled == ordinary.greedy.prefilled


def adapted_gradient(way: str) -> torch.Tensor:
    """Of all that trains, with adapters that do something: float32 by peft, or in half precision by peft or by us."""
    model, batch = make_model("llama", "mllm_varlen"), batch_of([[make_processor()(make_sample(i)) for i in range(4)]])
    torch.manual_seed(0)
    choose_trainable(model, LearningRates(connector=1e-3, llm=1e-3), Lora(rank=4, alpha=8))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    set_mode(model.to("cuda"))
    assert way != "fast" or fast_lora.convert(model) == 14
    with torch.autocast("cuda", torch.bfloat16, enabled=way != "float32"):
        loss = NextToken(model)(**model_inputs(batch, torch.device("cuda")))
    loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def test_fast_lora_is_about_as_near_to_float32_on_the_device_as_peft_is() -> None:
    """On a CPU the ratio is 0.85 to 1.22, by the seed."""
    exact, peft, fast = (adapted_gradient(way) for way in ("float32", "peft", "fast"))
    assert 0 < (fast - exact).norm() < 1.5 * (peft - exact).norm() < 0.1 * exact.norm()


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_kernels_of_one_token_give_the_llms_own_logits(family: str) -> None:
    model = sharp(make_model(family, head_dim=64)).to("cuda", torch.bfloat16)
    quick = Assistant(model, make_processor(), "compiled")
    for talk in turns(picture(1), number=1):
        "".join(quick.stream(talk, 8))
    assert isinstance(quick.greedy, RecordedGreedy)
    assert (quick.greedy.refused, quick.greedy.failed) == ("", {})


@pytest.mark.parametrize("mixed_precision", ["no", "bf16"])
@pytest.mark.parametrize("connector", [MLPConnector(), AvgPoolConnector(tokens=1)], ids=["whole", "pooled"])
def test_cached_features_equal_live_ones_on_the_device(tmp_path: Path, connector: Any, mixed_precision: str) -> None:
    """Written behind the encoder, read ahead, copied beside other work; twice, so that pinned memory is used again."""
    model = make_model(connector=connector).requires_grad_(False).eval().to("cuda")
    drawn = torch.Generator().manual_seed(0)
    parts = [torch.randint(0, 256, (n, 3, 28, 28), generator=drawn).to(torch.uint8) for n in (3, 11, 1, 8)]
    batches: Any = [{"pixel_values": part, "num_images": len(part)} for part in parts]
    accelerator, half = Accelerator(), torch.autocast("cuda", torch.bfloat16, enabled=mixed_precision == "bf16")
    busy = torch.randn(2048, 2048, device="cuda")
    with torch.no_grad(), half:
        live = [FeatureCache(0)(model.kept, part.cuda()) for part in parts]
        folder = FeatureFolder(tmp_path, {}, tuple(live[0].shape[1:]), live[0].dtype, 1.0)
        in_memory, in_folder = FeatureCache(1.0), StoredFeatures(folder, pin=True)
        for _ in range(3):
            for part, expected in zip(parts, live, strict=True):
                assert torch.equal(in_memory(model.kept, part.cuda()), expected)
            model.feature_cache, block = in_folder, list(in_folder.one_ahead(iter(batches), len(batches)))
            step = StepInputs(accelerator, model, block, "token")
            found = []
            for part in parts:
                torch.mm(busy, busy)  # what a copy travels beside
                found.append(step.features(len(part)))
            assert all(torch.equal(own, expected) for own, expected in zip(found, live, strict=True))
            in_folder.finish()
    assert all(own.is_cuda for own in found)


def test_images_of_a_step_in_groups_are_those_of_each_micro_batch_on_the_device(tmp_path: Path) -> None:
    data, losses = write_llava(tmp_path, 12), []
    for size in (False, 3, "auto"):
        config = settings(tmp_path / str(size), encoder_batch=size, rows_per_micro_batch=1)
        run(data, config, accelerator=Accelerator())
        losses.append([number for line in metrics(config.output_dir) for number in line])
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert losses[2] == pytest.approx(losses[0], rel=1e-4)


ROOT = Path(__file__).parent.parent
ENGINES = {
    "plain": "DDP or one process",
    "zero2": "DeepSpeed ZeRO stage 2",
    "zero3": "DeepSpeed ZeRO stage 3",
    "zero3_offload": "DeepSpeed ZeRO stage 3",
    "fsdp2": "FSDP2",
}
WHAT: dict[str, dict[str, Any]] = {
    "align": {"learning_rate": {"connector": 1e-2}},
    "lora": {"learning_rate": {"connector": 1e-3, "llm": 1e-2}, "lora": {"rank": 4, "alpha": 8}},
}
PRECISION = {"float32": ("float32", "no", 1e-4), "bfloat16": ("bfloat16", "bf16", 2e-2)}
"""Of frozen weights, of the computation, and how near two runs must be."""
needs_two = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")


@pytest.fixture(scope="module")
def runs(hub: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gpu")
    (folder / "hub").symlink_to(hub)
    write_llava(folder, 12)
    return folder


def losses(runs: Path, engine: str, what: str, precision: str, devices: int, kind: str = "cuda") -> list[float]:
    """Of four steps under an engine, started as a user starts it; kept for the next test that asks."""
    name = f"{engine}-{what}-{precision}-{devices}"
    if not (runs / name / "ledger.json").is_file():
        train(runs, name, engine, what, precision, devices, kind)
    return [json.loads(line)["loss"] for line in (runs / name / "metrics.jsonl").read_text().splitlines()]


def train(runs: Path, name: str, engine: str, what: str, precision: str, devices: int, kind: str) -> None:
    dtype, mixed, _ = PRECISION[precision]
    steps = {"steps": 4, "rows_per_step": 4, "rows_per_micro_batch": 2, "mixed_precision": mixed}
    config = {
        "model": {"vision_encoder": str(runs / "hub" / "encoder"), "llm": str(runs / "hub" / "llm"), "dtype": dtype},
        "data": {"sources": [{"path": str(runs / "data.json")}], "seq_length": 96, "num_workers": 0},
        "train": {"output_dir": str(runs / name), **steps, **WHAT[what]},
    }
    (runs / f"{name}.yaml").write_text(yaml.safe_dump(config))
    launcher = [sys.executable, "-m", "accelerate.commands.launch", *launched_by(engine, devices, kind)]
    command = [*launcher, "recipes/pretrain.py", "--config", str(runs / f"{name}.yaml")]
    environment = {**os.environ, "COLUMNS": "200", "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}
    for own in ("ACCELERATE_USE_CPU", "DS_ACCELERATOR"):  # of a test before, in this process
        environment.pop(own, None)
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    said = f"ranks: {devices}, on {kind}" + ("" if engine == "plain" else f", {ENGINES[engine]}")
    assert said in done.stdout


def launched_by(engine: str, devices: int, kind: str) -> list[str]:
    """The arguments of `accelerate launch`."""
    several = ["--num_processes", str(devices), "--main_process_port", "0"]  # 0: a free one, runs lie beside each other
    if engine != "plain":
        return ["--config_file", f"deepspeed_configs/accelerate_{'cpu_' * (kind == 'cpu')}{engine}.yaml", *several]
    return ["--cpu"] * (kind == "cpu") + ["--multi_gpu"] * (devices > 1) + several


def skip_without(engine: str) -> None:
    if engine.startswith("zero") and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("deepspeed is not installed: pip install 'mllm[deepspeed]'")


@pytest.mark.parametrize("precision", PRECISION)
@pytest.mark.parametrize("what", WHAT)
@pytest.mark.parametrize("engine", ["zero2", "zero3", "zero3_offload", "fsdp2"])
def test_engine_on_one_device_has_the_losses_of_one_process(runs: Path, engine: str, what: str, precision: str) -> None:
    skip_without(engine)
    expected = losses(runs, "plain", what, precision, 1)
    assert losses(runs, engine, what, precision, 1) == pytest.approx(expected, rel=PRECISION[precision][2])


@needs_two
@pytest.mark.parametrize("precision", PRECISION)
@pytest.mark.parametrize("what", WHAT)
@pytest.mark.parametrize("engine", ENGINES)
def test_engine_on_two_devices_has_the_losses_of_one_process(
    runs: Path, engine: str, what: str, precision: str
) -> None:
    skip_without(engine)
    expected = losses(runs, "plain", what, precision, 1)
    assert losses(runs, engine, what, precision, 2) == pytest.approx(expected, rel=PRECISION[precision][2])
