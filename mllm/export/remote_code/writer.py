"""For a model that no stock class holds: its own code beside its weights, flat, readable, without an import of mllm.

Enters: a `Trained`. Leaves: Python files for the exported folder, `config.json` as a dictionary (with `auto_map`) and
tensors by name. The files are the rooms of this house that the model runs through, word for word: `modeling_mllm.py`
and `configuration_mllm.py` from here, encoder and connector from `mllm/models/`. Only their imports are rewritten, so
that the exported code cannot drift from the code that trained, and a new connector is exported without a line here.
"""

from __future__ import annotations

import ast
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor, nn

import mllm
from mllm.export.layout import is_tied, published_names, text_config, vision_config
from mllm.export.llava import language_tensors, vocabulary_rows
from mllm.export.trained import Trained
from mllm.models.fused_encoder import FusedEncoder

ARCHITECTURE = "MllmForConditionalGeneration"
ROOTS = ("mllm.export.remote_code.modeling_mllm", "mllm.export.remote_code.configuration_mllm")
CONNECTOR = "mllm.export.remote_code.connector_of"
"""Written anew for each model: which connector it has."""
SCHEMA = "mllm.schema"
"""Validates settings here; replaced by an empty base there, where they come from `config.json`."""
IMPORT = re.compile(r"^(\s*)from (mllm[.\w]*) import (.+)$", re.MULTILINE)


def config(trained: Trained) -> dict[str, Any]:
    """What goes into `config.json`."""
    model = trained.model
    encoders = encoder_list(model.vision_encoder)
    configs = [vision_config(encoder.model) for encoder in encoders]
    return {
        "architectures": [ARCHITECTURE],
        "auto_map": {
            "AutoConfig": "configuration_mllm.MllmConfig",
            "AutoModel": "modeling_mllm.MllmModel",
            "AutoModelForImageTextToText": f"modeling_mllm.{ARCHITECTURE}",
        },
        "model_type": "mllm",
        "image_token_id": model.image_token_id,
        "connector": asdict(trained.parts.connector),
        "feature_layer": trained.parts.feature_layer,
        "feature_norm": trained.parts.feature_norm,
        "grids": [asdict(encoder.grid) for encoder in encoders],
        "normalisations": [asdict(encoder.normalisation) for encoder in encoders],
        "any_resolution": asdict(newline.layout) if (newline := model.image_newline) is not None else None,
        "lm_head_bias": getattr(model.llm.get_output_embeddings(), "bias", None) is not None,
        "tie_word_embeddings": is_tied(model.llm),
        "vision_config": configs[0],
        "more_vision_configs": configs[1:],
        "text_config": text_config(model.llm, vocabulary_rows(trained)),
    }


def encoder_list(encoder: Any) -> list[Any]:
    return list(encoder.encoders) if isinstance(encoder, FusedEncoder) else [encoder]


def tensors(trained: Trained) -> dict[str, Tensor]:
    """Every weight, under the names of `modeling_mllm.py`; inside transformers' own models under published names."""
    model = trained.model
    found = language_tensors(trained, "model.language_model.", "lm_head.weight")
    if (bias := getattr(model.llm.get_output_embeddings(), "bias", None)) is not None:
        found["lm_head.bias"] = bias.detach()
    named = {"vision_tower": model.vision_encoder, "multi_modal_projector": model.connector}
    for name, part in {**named, "image_newline": model.image_newline}.items():
        if part is not None:
            found |= {f"model.{name}.{key}": tensor for key, tensor in published(part).items()}
    return {name: tensor for name, tensor in found.items() if ".vision_model.head." not in name}  # SigLIP's, unused


def published(module: nn.Module) -> dict[str, Tensor]:
    """The state dict, with every model of transformers inside it under its published names."""
    from transformers import PreTrainedModel

    inside: list[str] = []
    for name, part in module.named_modules():
        if isinstance(part, PreTrainedModel) and not any(name.startswith(f"{outer}.") for outer in inside):
            inside.append(name)
    found = {
        key: tensor
        for key, tensor in module.state_dict().items()
        if not any(key.startswith(f"{name}.") for name in inside)
    }
    for name in inside:
        part = module.get_submodule(name)
        found |= {f"{name}.{key}": tensor for key, tensor in published_names(part).items()}
    return found


def write_code(trained: Trained, folder: Path) -> list[str]:
    """The files; their names."""
    connector = type(trained.parts.connector)
    needed = closure([*ROOTS, connector.__module__, "mllm.models.fused_encoder"])
    for module in needed - {SCHEMA, CONNECTOR}:
        (folder / f"{flat(module)}.py").write_text(flattened(source(module)))
    with (folder / f"{flat(ROOTS[0])}.py").open("a") as file:
        file.write(every_file(needed))
    (folder / f"{flat(CONNECTOR)}.py").write_text(chosen_connector(connector))
    (folder / f"{flat(SCHEMA)}.py").write_text(empty_schema(needed - {SCHEMA}))
    return sorted(f"{flat(module)}.py" for module in needed)


def closure(modules: list[str]) -> set[str]:
    """These modules of ours and all that they import of ours; what is behind the two replaced ones is not followed."""
    found: set[str] = set()
    waiting = [*modules, CONNECTOR, SCHEMA]
    while waiting:
        module = waiting.pop()
        if module in found:
            continue
        found.add(module)
        if module not in (SCHEMA, CONNECTOR):
            waiting += [match[2] for match in IMPORT.finditer(source(module))]
    return found


def source(module: str) -> str:
    path = Path(mllm.__file__).parent.joinpath(*module.split(".")[1:])
    return path.with_suffix(".py").read_text()


def flat(module: str) -> str:
    """The name of a module in the exported folder, where all lie side by side."""
    name = module.rpartition(".")[2]
    return name if name.endswith("_mllm") else f"mllm_{name}"


def flattened(text: str) -> str:
    return IMPORT.sub(lambda found: f"{found[1]}from .{flat(found[2])} import {found[3]}", text)


def every_file(needed: set[str]) -> str:
    """Lines for the end of the modeling file: transformers 4.57 copies what that file imports, and no file behind."""
    names = sorted(flat(module) for module in needed - set(ROOTS))
    imports = "".join(f"from .{name} import __name__ as _  # noqa: E402, F401\n" for name in names)
    return f"\n\n# every file that is needed, for loaders that copy only those that are named here\n{imports}"


def chosen_connector(connector: type) -> str:
    return (
        '"""Written by `mllm export`: the connector of this model."""\n\n'
        f"from .{flat(connector.__module__)} import {connector.__name__}\n\n\n"
        "def make_connector(settings, encoder_width, llm_width, num_patches):\n"
        '    """[N, P, encoder_width] -> [N, V, llm_width]."""\n'
        f"    return {connector.__name__}(**settings).build(encoder_width, llm_width, num_patches)\n"
    )


def empty_schema(modules: set[str]) -> str:
    """`Schema` without its checks, and the names of types that the files import beside it."""
    names = {
        alias.name
        for module in modules - {CONNECTOR}
        for node in ast.walk(ast.parse(source(module)))
        if isinstance(node, ast.ImportFrom) and node.module == SCHEMA
        for alias in node.names
    }
    types = [f"{name} = object\n" for name in sorted(names - {"Schema"})]
    return "".join(
        [
            '"""Written by `mllm export`: where the model was trained, these check settings."""\n\n\n',
            'class Schema:\n    """Settings come from config.json."""\n',
            *(["\n\n", *types] if types else []),
        ]
    )
