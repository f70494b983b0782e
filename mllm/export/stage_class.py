"""A stage folder for transformers' Auto classes, where mllm is installed: read as what it would be exported as.

    import mllm
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model = AutoModelForImageTextToText.from_pretrained("runs/llava15/instruct")
    processor = AutoProcessor.from_pretrained("runs/llava15/instruct")

Enters: a finished stage (its `config.json` says `mllm_stage`) or the Hub id of one. Leaves: the model of the class that
holds it exactly, its adapters merged, and the stock processor. Nothing is proven here: `mllm export` does that.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

from mllm.registration import STAGE_TYPE

TOLD = ("config", "_commit_hash", "revision", "trust_remote_code", "_from_auto")
"""What the Auto classes hand on about the folder that they were given, not about the one that is read in its place."""


class MllmStageConfig(PretrainedConfig):
    """A stage names its parts in `config.yaml`; transformers wants this beside it."""

    model_type = STAGE_TYPE


class MllmStage:
    """Not a model itself."""

    config_class = MllmStageConfig

    @classmethod
    def from_pretrained(cls, name: Any, *_: Any, **options: Any) -> Any:
        """The model, in the dtype that it was trained with unless `dtype` says otherwise.

        Raises:
            ValueError: no such stage, or one that is not exported (tiles, markers, a Q-Former that reads words).
        """
        import torch
        from transformers import AutoModelForImageTextToText

        from mllm.export.trained import load
        from mllm.export.transformers_folder import write_files

        with tempfile.TemporaryDirectory() as place:
            trained = load(str(name))
            write_files(trained, Path(place), getattr(torch, trained.parts.dtype))
            del trained
            return AutoModelForImageTextToText.from_pretrained(place, **theirs(options))


class MllmStageProcessor:
    """Not a processor itself."""

    config_class = MllmStageConfig

    @classmethod
    def from_pretrained(cls, name: Any, **options: Any) -> Any:
        """The stock processor; no weight is read for it."""
        from transformers import AutoProcessor

        from mllm.export.trained import skeleton
        from mllm.export.transformers_folder import write_processor

        with tempfile.TemporaryDirectory() as place:
            write_processor(skeleton(str(name)), Path(place))
            return AutoProcessor.from_pretrained(place, **theirs(options))


def theirs(options: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if name not in TOLD}
