"""Our own stage folder with nothing beside its weights: every adapter merged, four bits dequantised.

Enters: the name of a finished stage. Leaves: a stage folder that `mllm chat`, `mllm eval` and `init_from` read without
peft, and the proof that it says the same.
"""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

import torch

from mllm.config import dump_config
from mllm.export import Dtype, Exported
from mllm.export.proof import TOLERANCE, Proof, questions
from mllm.export.trained import Trained, load
from mllm.generate import Assistant
from mllm.train.stage_folder import save_stage


def write(model: str, folder: Path, dtype: Dtype, check_with: list[str]) -> Exported:
    """Merge, save, load again, compare."""
    if check_with not in ([], ["here"]):
        raise ValueError("--check-with is for other people's loaders: --to merged is read by mllm alone")
    trained = load(model)
    name = trained.parts.dtype if dtype == "auto" else dtype
    kind = getattr(torch, name)
    own = trained.model
    for part in (own.llm, own.vision_encoder):
        for parameter in part.parameters():
            parameter.data = parameter.data.to(kind)
    plain = replace(trained.parts, dtype=name, quantisation=None)
    save_stage(
        folder,
        own,
        trained.processor,
        dump_config(replace(trained.config, model=plain, init_from=None, init_parts=None)),
    )
    own.float()
    return Exported(folder, "merged", "stage folder", "adapters are in the weights", (prove(trained, folder),))


@torch.inference_mode()
def prove(trained: Trained, folder: Path) -> Proof:
    """Load the folder as `mllm chat` does, in float32, and ask both."""
    import transformers

    ours, theirs = Assistant(trained.model, trained.processor), Assistant.load(folder, "cpu")
    theirs.model.float()
    worst, faults = 0.0, []
    with tempfile.TemporaryDirectory() as place:
        asked = questions(Path(place))
        for sample in asked:
            logits = [a.model.llm(**a.inputs([a.processor.prompt(sample)])).logits for a in (ours, theirs)]
            scale = max(1.0, logits[0].abs().max().item())
            worst = max(worst, (logits[0] - logits[1]).abs().max().item() / scale)
            if ours.answer([sample], 16) != theirs.answer([sample], 16):
                faults.append(f"{sample.id}: another answer")
    if not worst <= TOLERANCE:
        faults.append(f"logits differ by {worst:.1e} (at most {TOLERANCE:g})")
    return Proof("mllm", transformers.__version__, tuple(faults), worst, len(asked))
