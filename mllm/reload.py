"""Does a stage on disk say what the model in memory says? Read it back, as a chat would, and compare logits.

Enters: the trained model, or (in a fresh process) the folder of its stage. Leaves: the largest difference of their
logits on one fixed question about one fixed picture; where there is an adapter, also that of the merged model.

    python -m mllm.reload STAGE EXPECTED.pt RESULT.json
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mllm.config import stage_run
from mllm.data.collate import stack_instructions, stack_pixels
from mllm.data.processor import Processor
from mllm.models.build import build_model
from mllm.models.multimodal import MultimodalLM
from mllm.models.quantised import is_4bit, is_quantised
from mllm.train.audit import AuditMode
from mllm.train.stage_folder import load_stage
from mllm.train.tuning.adapters import ADAPTED, is_adapted, merge_lora, on_dequantised, put, wrapped
from mllm.train.tuning.scales import plain
from mllm.types import Mark, Message, Sample

if TYPE_CHECKING:
    from collections.abc import Iterator

    from accelerate import Accelerator

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.05, torch.float16: 0.02}
"""Largest difference of two logits, as a share of the largest logit, by the coarsest dtype of the model. On one device
they are equal to the last bit; a GPU adds in another order than the CPU on which the stage is read back."""
POSITIONS = 16
"""The last ones of the question, which have the picture behind them: all of them would be gigabytes of logits."""
LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_", "GROUP_", "ROLE_", "MASTER_", "TORCHELASTIC_", "ACCELERATE_", "MLLM_FSDP2")
"""Beginnings of what a launcher sets: the fresh process is alone."""


def check_reload(
    accelerator: Accelerator, model: MultimodalLM, processor: Processor, folder: Path, mode: AuditMode
) -> dict[str, Any]:
    """Compare the model in memory with its stage. Every rank calls; the main one has the result.

    Returns:
        `process` (fresh or same), `difference` and `tolerance`, perhaps `merged_difference`; `error` where the stage
        cannot be read back, or says something else.
    """
    with as_read_back(model):
        logits = probe(model.eval(), processor, accelerator.device)  # [S, vocabulary]
    expected = {
        "logits": logits,
        "dtypes": {plain(name): p.dtype for name, p in model.named_parameters() if not is_4bit(p)},
    }
    if not accelerator.is_main_process:
        return {}
    if mode == "quick":
        return {"process": "same", **compare(folder, expected)}
    return {"process": "fresh", **in_fresh_process(folder, expected)}


def in_fresh_process(folder: Path, expected: dict[str, Any]) -> dict[str, Any]:
    """On the CPU: the device is full of the model that was trained."""
    own = {name: value for name, value in os.environ.items() if not name.startswith(LAUNCHER)}
    with tempfile.TemporaryDirectory() as place:
        asked, answer = Path(place) / "expected.pt", Path(place) / "result.json"
        torch.save(expected, asked)
        command = [sys.executable, "-m", "mllm.reload", str(folder), str(asked), str(answer)]
        done = subprocess.run(
            command, env={**own, "CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True, check=False
        )
        if done.returncode or not answer.is_file():
            return {"error": f"the stage could not be read back: {(done.stderr.strip().splitlines() or ['?'])[-1]}"}
        result: dict[str, Any] = json.loads(answer.read_text())
        return result


def compare(folder: Path, expected: dict[str, Any]) -> dict[str, Any]:
    """Build, load, ask, and merge what can be merged."""
    model, processor = read_back(folder, expected["dtypes"])
    found = probe(model, processor, torch.device("cpu"))
    coarsest = max(expected["dtypes"].values(), key=lambda dtype: TOLERANCE.get(dtype, 0.0))
    result: dict[str, Any] = {
        "difference": difference(found, expected["logits"]),
        "tolerance": TOLERANCE.get(coarsest, TOLERANCE[torch.float32]),
        "dtype": str(coarsest).removeprefix("torch."),
    }
    if not result["difference"] <= result["tolerance"]:
        result["error"] = (
            f"the stage that was written says something else than the model that was trained: logits differ by "
            f"{result['difference']:.1e} of the largest, {result['tolerance']:g} is allowed. Do not use {folder}"
        )
    if any(is_adapted(wrapped(model, name)) for name in ADAPTED):
        result |= merged(model, processor, result)
    return result


def read_back(folder: Path, dtypes: dict[str, torch.dtype]) -> tuple[MultimodalLM, Processor]:
    """As `Assistant.load` does it, each weight in the dtype that it had in memory."""
    processor = Processor.load(folder / "processor")
    parts = stage_run(folder).parts()
    model = build_model(parts, processor.image_token_id, layout=processor.layout)
    for name, parameter in model.named_parameters():
        if name in dtypes:
            parameter.data = parameter.data.to(dtypes[name])
    load_stage(model, folder)
    return model.eval(), processor


def merged(model: MultimodalLM, processor: Processor, result: dict[str, Any]) -> dict[str, Any]:
    """The same question in float32 with the adapter beside its weights, and with it in them."""
    needed = 4 * sum(p.numel() for p in model.parameters())
    if needed > (room := free_memory()) / 2:
        return {
            "merged_skipped": f"not tried: in float32 the model takes {needed / 2**30:.0f} of {room / 2**30:.0f} GiB"
        }
    for name in ADAPTED:
        if is_adapted(part := wrapped(model, name)) and is_quantised(part):
            put(model, name, on_dequantised(part))
    beside = probe(model.float().eval(), processor, torch.device("cpu"))
    merge_lora(model)
    within = difference(probe(model.float().eval(), processor, torch.device("cpu")), beside)
    allowed = TOLERANCE[torch.float32]
    told = (
        f"the merged adapter says something else: logits differ by {within:.1e} of the largest, {allowed:g} is allowed"
    )
    return {"merged_difference": within, **({"error": result.get("error", told)} if not within <= allowed else {})}


def free_memory() -> int:
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def difference(found: Tensor, expected: Tensor) -> float:
    """The largest, as a share of the largest logit; NaN differs from everything."""
    return float((found - expected).abs().max() / expected.abs().max().clamp_min(1e-12))


@torch.no_grad()
def probe(model: MultimodalLM, processor: Processor, device: torch.device) -> Tensor:
    """Logits behind the last tokens of a fixed question [up to 16, vocabulary], float32, in the computer's memory."""
    prompt = processor.prompt(question())
    ids = torch.tensor([prompt.input_ids], device=device)  # [1, S]
    pixels = stack_pixels([prompt.pixel_values], processor.pixel_shape).to(device)  # [1, 3, H, W]
    words = stack_instructions(prompt.instructions)
    positions = torch.arange(ids.shape[1], device=device)[None]
    with roots_whole(model), in_full_float32():
        words = None if words is None else words.to(device)
        hidden = model(ids, positions, pixels, 1, words, image_sizes=prompt.image_sizes)  # [1, S, D]
        return model.logits(hidden[0, -POSITIONS:]).float().cpu()


def question() -> Sample:
    """The same for every model: noise, and words about it."""
    from PIL import Image

    noise = torch.randint(0, 256, (240, 320, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    message = Message("user", [Mark.IMAGE, "\nWhat is in this picture, and where?"])
    return Sample("probe", [message], [Image.fromarray(noise.numpy())], where="the audit's question")


@contextmanager
def as_read_back(model: MultimodalLM) -> Iterator[None]:
    """Without what training alone sets: images in groups and compiled blocks add in another order, which is no fault of
    the files (4e-7 of the largest logit where the picture is five tiles)."""
    was = model.feature_cache, model.encoder_batch, model.fewest_images
    model.feature_cache, model.encoder_batch, model.fewest_images = None, None, 1
    # what was never imported has compiled nothing, and importing it takes seconds
    compiled = "torch._dynamo" in sys.modules
    try:
        with torch.compiler.set_stance("force_eager") if compiled else nullcontext():
            yield
    finally:
        model.feature_cache, model.encoder_batch, model.fewest_images = was


@contextmanager
def in_full_float32() -> Iterator[None]:
    """A GPU rounds what a convolution is given in float32 to ten bits unless told otherwise, a CPU never does: in an
    encoder's patches that alone would be a difference."""
    kinds = [torch.backends.cudnn.conv, torch.backends.cuda.matmul]  # type: ignore[attr-defined]
    was = [kind.fp32_precision for kind in kinds]
    try:
        for kind in kinds:
            kind.fp32_precision = "ieee"
        yield
    finally:
        for kind, own in zip(kinds, was, strict=True):
            kind.fp32_precision = own


@contextmanager
def roots_whole(model: nn.Module) -> Iterator[None]:
    """FSDP2 puts layers together when they are called, and what belongs to no layer when the objective is; here the
    model is called without it."""
    units = [module for module in model.modules() if hasattr(module, "unshard")]
    inside = {id(p) for unit in units for p in unit.parameters()}
    cut = [
        (module, name, p)
        for module in model.modules()
        for name, p in module.named_parameters(recurse=False)
        if hasattr(p, "full_tensor") and id(p) not in inside
    ]
    for module, name, p in cut:
        module._parameters[name] = nn.Parameter(p.full_tensor(), requires_grad=False)  # type: ignore[attr-defined]
    yield
    for module, name, p in cut:
        module._parameters[name] = p


def main(stage: str, expected: str, result: str) -> None:
    from mllm.quiet import quiet_libraries

    quiet_libraries()
    found = compare(Path(stage), torch.load(expected, weights_only=True))
    Path(result).write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
