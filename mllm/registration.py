"""transformers' Auto classes know ours as soon as both packages are there; neither is imported for it.

Enters: `import mllm`, before `import transformers` or after. Leaves: a watch over the few modules in which transformers
keeps its Auto classes. When one of them has been loaded, because somebody is about to use it, the classes that belong
there are imported and registered. From then on `from_pretrained` reads exported folders without `trust_remote_code`,
and stage folders.
"""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

AUTO = "transformers.models.auto"
CODE = "mllm.export.remote_code"
STAGE = "mllm.export.stage_class"
STAGE_TYPE = "mllm_stage"
"""What the `config.json` of a stage folder calls it."""
ENTRIES = (
    (f"{AUTO}.configuration_auto", f"{CODE}.configuration_mllm", "AutoConfig", "MllmConfig"),
    (f"{AUTO}.configuration_auto", STAGE, "AutoConfig", "MllmStageConfig"),
    (f"{AUTO}.modeling_auto", f"{CODE}.modeling_mllm", "AutoModel", "MllmModel"),
    (f"{AUTO}.modeling_auto", f"{CODE}.modeling_mllm", "AutoModelForImageTextToText", "MllmForConditionalGeneration"),
    (f"{AUTO}.modeling_auto", STAGE, "AutoModelForImageTextToText", "MllmStage"),
    (f"{AUTO}.processing_auto", STAGE, "AutoProcessor", "MllmStageProcessor"),
)
"""Where an Auto class is, where ours is; the Auto class, ours."""
WATCHED = {name for entry in ENTRIES for name in entry[:2]}


class Watch:
    """Finds nothing of its own: lets `meet` run behind the modules that are watched."""

    def find_spec(self, name: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name not in WATCHED or (spec := PathFinder.find_spec(name, path, target)) is None:
            return None
        loader: Any = spec.loader
        load = loader.exec_module

        def load_then_meet(module: ModuleType) -> None:
            load(module)
            meet(name)

        loader.exec_module = load_then_meet
        return spec


def announce() -> None:
    """What is loaded already meets ours now, the rest when it is loaded."""
    for name in sorted(WATCHED & sys.modules.keys()):
        meet(name)
    sys.meta_path.insert(0, Watch())


def meet(loaded: str) -> None:
    """Register what belongs to a module that has just been loaded. Each of the two may be in the middle of an import,
    which the other asked for: it comes back here when it is finished."""
    for there, here, auto_name, name in ENTRIES:
        auto = getattr(sys.modules.get(there), auto_name, None)
        in_the_middle = here in sys.modules and not hasattr(sys.modules[here], name)
        if loaded in (there, here) and auto is not None and not in_the_middle:
            ours = getattr(import_module(here), name)
            auto.register(key_of(ours), ours, exist_ok=True)


def key_of(ours: Any) -> Any:
    """What the Auto class knows ours by: a config by its model type, the others by their config."""
    return getattr(ours, "config_class", None) or ours.model_type
