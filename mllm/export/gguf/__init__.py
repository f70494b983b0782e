"""A model for llama.cpp: `model.gguf`, the LLM with its vocabulary, and `mmproj-model.gguf`, encoder and connector.

Enters: the name of a finished stage. Leaves: the two files, read back tensor for tensor by the `gguf` package.

Facts of llama.cpp (read in its sources and run at 0c1e570, 2026-10-01) behind the refusals: its `mlp` projector is
two linear layers with the tanh form of GELU between them; encoders with a class token get their positions wrong
(its issue 25814), so only those without one are written, SigLIP for instance; pictures are padded to a square first.
"""

from __future__ import annotations

from pathlib import Path

import torch

from mllm.export import Dtype, Exported
from mllm.export.gguf import llm, vision
from mllm.export.gguf.file import File
from mllm.export.trained import Trained, check_prompt, load

LLM, VISION = "model.gguf", "mmproj-model.gguf"
NOTES = (
    "llama.cpp itself was not run: llama-mtmd-cli -m model.gguf --mmproj mmproj-model.gguf --image X -p $'\\nWHAT'",
    "llama.cpp computes GELU in its tanh form: visual tokens differ from transformers' in the third decimal",
)
UNPADDED = "llama.cpp pads pictures to a square, this model was trained without (data.image_fit: pad trains with)"


def write(model: str, folder: Path, dtype: Dtype, check_with: list[str]) -> Exported:
    """Both files, each compared with what it was made of.

    Raises:
        ValueError: llama.cpp has no such LLM, tokenizer, encoder or connector; every reason is told.
    """
    try:
        import gguf  # noqa: F401
    except ImportError as error:
        raise ValueError("--to gguf needs the gguf package: pip install 'mllm[gguf]'") from error
    trained = load(model)
    check_prompt(trained)
    check(trained)
    kind = getattr(torch, trained.parts.dtype if dtype == "auto" else dtype)
    for name, file in ((LLM, llm.describe(trained)), (VISION, vision.describe(trained))):
        file.write(folder / name, kind)
        file.read_back(folder / name, kind)
    notes = NOTES if trained.processor.image_fit == "pad" else (*NOTES, UNPADDED)
    return Exported(folder, "gguf", f"{LLM} and {VISION}", "every tensor read back equal", (), notes)


def check(trained: Trained) -> None:
    """Refuse what llama.cpp would load and get wrong, and what it cannot load."""
    if obstacles := [*llm.obstacles(trained.model.llm), *vision.obstacles(trained.model)]:
        raise ValueError("no GGUF of this model: " + "; ".join(obstacles))


__all__ = ["LLM", "VISION", "File", "check", "write"]
