"""The whole run in one object: defaults < one YAML < flags.

Enters: `--config FILE.yaml` and any flags, or a saved `config.yaml`. Leaves: a `RunConfig`. All mistakes of a YAML
are told at once, each with its path and, for a key nobody knows, the nearest one that exists.
"""

from __future__ import annotations

import argparse
import difflib
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, is_dataclass, replace
from pathlib import Path
from typing import Any, get_args, get_type_hints

import yaml
from pydantic import TypeAdapter, ValidationError

from mllm.data.loader import DataConfig
from mllm.flags import lay_over, split_flags
from mllm.models.build import ModelConfig
from mllm.schema import Schema, unknown_tag
from mllm.train.settings import TrainConfig
from mllm.train.tuning.scales import PartName

LOCAL = ("vision_encoder", "llm")
"""What of a model may be named by a folder of this machine."""


@dataclass
class RunConfig(Schema):
    """One stage."""

    train: TrainConfig
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig | None = None
    """The parts; where `init_from` is set they may be left out and are that stage's."""
    init_from: Path | None = None
    """A finished stage whose trained parts this one starts from."""
    init_parts: list[PartName] | None = None
    """Which of them (`[connector]`); all where this is not set. What is left out starts anew."""
    resume: bool = False
    """Go on from the newest checkpoint in the output folder."""
    overwrite: bool = False
    """Empty the output folder first, if it is used."""
    dry_run: bool = False
    """Say everything that is said before the first step, then stop."""
    json: Path | None = None
    """A file that gets the numbers that are said before the first step."""

    def parts(self) -> ModelConfig:
        """The model section, its own or the earlier stage's."""
        if self.model:
            return self.model
        if self.init_from is None:
            raise ValueError("no model: set `model` (vision_encoder, llm, connector) or `init_from`, a finished stage")
        return stage_run(self.init_from).parts()


def parse(argv: list[str] | None = None) -> RunConfig:
    """Defaults, then the YAML of --config, then the other flags; exits with a readable list on any mistake."""
    import tyro

    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--config", type=Path)
    known, arguments = first.parse_known_args(argv)
    try:
        raw = read_yaml(known.config) if known.config else {}
        flags, rest = split_flags(arguments)
        if any(path[0] == "model" for path, _ in flags) and not raw.get("model"):
            raw["model"] = earlier_model(raw)
        for path, value in flags:
            lay_over(raw, path, value, Loader)
        # without a YAML, `--help` and what is missing are tyro's to tell
        source = " with ".join(str(part) for part in (known.config, "the flags") if part)
        options: dict[str, Any] = {"default": validate(raw, source)} if raw else {}
        return tyro.cli(RunConfig, args=rest, use_underscores=True, config=(tyro.conf.AvoidSubcommands,), **options)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def earlier_model(raw: dict[str, Any]) -> dict[str, Any]:
    """The model section that flags change where the YAML has none: the earlier stage's, if it names one."""
    if not raw.get("init_from"):
        return {}
    folder = Path(raw["init_from"])
    earlier = read_yaml(stage_config(folder))
    return with_parts(dict(earlier.get("model") or {}), folder, (earlier.get("train") or {}).get("output_dir"))


def load_config(path: Path) -> RunConfig:
    """Validate a YAML file.

    Raises:
        ValueError: one line a mistake.
    """
    return validate(read_yaml(path), str(path))


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file, unchecked.

    Raises:
        ValueError: there is no such file, or it holds no YAML mapping.
    """
    if not Path(path).is_file():
        raise ValueError(f"no config file {path}")
    try:
        raw = yaml.load(Path(path).read_text(), Loader=Loader) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is no YAML: {error}") from error
    if not isinstance(raw, dict):
        raise ValueError(f"{path} has mistakes:\n  expected sections (model, data, train), found {raw!r}")
    return raw


def validate(raw: Any, source: str) -> RunConfig:
    """Check keys, types and ranges; all mistakes of `source` in one `ValueError`, a line each."""
    try:
        return TypeAdapter(RunConfig).validate_python(raw)
    except ValidationError as error:
        mistakes = "\n  ".join(explain(mistake) for mistake in error.errors())
        raise ValueError(f"{source} has mistakes:\n  {mistakes}") from error


def dump_config(config: RunConfig) -> str:
    """The merged config as YAML that `load_config` reads back; how the run was started is left out."""
    raw = TypeAdapter(RunConfig).dump_python(config, mode="json", exclude={"resume", "overwrite", "dry_run", "json"})
    return yaml.safe_dump({**raw, "model": TypeAdapter(ModelConfig).dump_python(config.parts())}, sort_keys=False)


def stage_config(folder: Path) -> Path:
    """The config of a stage folder."""
    path = Path(folder) / "config.yaml"
    if not path.is_file():
        raise ValueError(f"{folder} is no stage folder: it has no config.yaml")
    return path


def stage_run(folder: Path) -> RunConfig:
    """The run that left a stage folder. Parts that it names from where it was started are found from anywhere."""
    config = load_config(stage_config(folder))
    if config.model:
        found = with_parts(vars(config.model), folder, config.train.output_dir)
        config = replace(config, model=replace(config.model, **{name: found[name] for name in LOCAL}))
    return config


def with_parts(model: dict[str, Any], folder: Path, output_dir: Path | str | None) -> dict[str, Any]:
    """A model section whose relative folders are found: those of here first, else from where the run was started."""
    above = list(Path(folder).resolve().parents)
    started = [place for place in above if output_dir and place / Path(output_dir) == Path(folder).resolve()]
    started = [] if Path(output_dir or "/").is_absolute() else started
    return {name: located(value, started, above) if name in LOCAL else value for name, value in model.items()}


def located(name: Any, started: list[Path], above: list[Path]) -> Any:
    """The folder of that name. What may be a Hub id (owner/name) is looked for where the run was started alone, other
    names in every folder above the stage."""
    if isinstance(name, list):
        return [located(one, started, above) for one in name]
    places = started if name.count("/") == 1 else [*started, *above]
    return next((str(place / name) for place in places if not Path(name).exists() and (place / name).is_dir()), name)


def explain(mistake: Any) -> str:
    """One line for one mistake: where, what, and the nearest key that exists."""
    if not mistake["loc"]:
        return f"expected sections (model, data, train), found {mistake['input']!r}"
    where = ".".join(str(part) for part in mistake["loc"] if part != "auto")  # what a source is without its format
    key = str(mistake["loc"][-1])
    if mistake["type"] == "union_tag_invalid":
        return f"{where}: {unknown_tag(**mistake['ctx'])}"
    if mistake["type"] == "union_tag_not_found":
        return f"{where}: expected a mapping of a part and its options, found {str(mistake['input'])[:80]!r}" + (
            ": write {path: FILE}" if "sources" in mistake["loc"] else ""
        )
    if mistake["type"] not in ("unexpected_keyword_argument", "extra_forbidden"):
        return f"{where}: {mistake['msg']}"
    if "auto" in mistake["loc"] and key in keys_beside((*mistake["loc"][:2], key)):
        return f"{where}: an option of one format: name it (`format: captions`, say) beside the option"
    known = set(known_keys(RunConfig))
    near = difflib.get_close_matches(key, keys_beside(mistake["loc"]), n=1) or difflib.get_close_matches(
        key, known, n=1
    )
    return f"{where}: unknown key" + (f", did you mean {near[0]!r}?" if near else "")


def known_keys(kind: Any) -> Iterator[str]:
    """Every field name anywhere in a tree of config classes."""
    if is_dataclass(kind):
        for name, hint in get_type_hints(kind, include_extras=False).items():
            if not name.startswith("__"):
                yield name
                yield from known_keys(hint)
    for argument in get_args(kind):
        yield from known_keys(argument)


def keys_beside(place: tuple[Any, ...]) -> set[str]:
    """Field names of the section in which a key stands; tags of unions and places in lists are passed over."""
    kinds: list[Any] = [RunConfig]
    for name in place[:-1]:
        hints = [get_type_hints(kind)[name] for kind in kinds if name in get_type_hints(kind)]
        kinds = [found for hint in hints for found in sections(hint)] or kinds
    return {name for kind in kinds for name in get_type_hints(kind)}


def sections(hint: Any) -> list[Any]:
    """The config classes that a type names."""
    return [hint] if is_dataclass(hint) else [found for argument in get_args(hint) for found in sections(argument)]


class Loader(yaml.SafeLoader):
    """YAML 1.1 takes `1e-3` for a string; people mean the number."""


Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?\d+(\.\d*)?[eE][-+]?\d+$"),
    list("-+0123456789"),
)
