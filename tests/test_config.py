"""Defaults < one YAML < flags; every mistake of a YAML told at once, in words."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import TypeAdapter

from mllm.config import RunConfig, dump_config, load_config, parse, validate
from mllm.models.connectors import LinearConnector, MLPConnector, QFormerConnector
from mllm.train.settings import TrainConfig

ROOT = Path(__file__).parent.parent
YAMLS = sorted(
    path for path in (ROOT / "recipes").rglob("*.yaml") if {"train", "data"} <= yaml.safe_load(path.read_text()).keys()
)
GOOD: dict[str, Any] = {
    "model": {"vision_encoder": "a/encoder", "llm": "b/llm", "connector": {"type": "mlp"}},
    "data": {"sources": [{"format": "llava", "path": "data.json"}], "seq_length": 512},
    "train": {"output_dir": "runs/x", "learning_rate": {"connector": 1e-3}, "lora": {"rank": 8}},
}


@pytest.fixture
def write(tmp_path: Path):
    def write(text: str | None = None, **sections: Any) -> Path:
        path = tmp_path / "run.yaml"
        path.write_text(yaml.safe_dump({**GOOD, **sections}) if text is None else text)
        return path

    return write


def mistakes(path: Path) -> str:
    with pytest.raises(ValueError, match=path.name) as raised:
        load_config(path)
    return str(raised.value)


# ---------------------------------------------------------------- YAML


def test_there_are_recipes_to_parse() -> None:
    assert {path.parent.name for path in YAMLS} >= {"tiny", "llava15"}


@pytest.mark.parametrize("path", YAMLS, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_every_recipe_parses_and_says_what_trains(path: Path) -> None:
    config = load_config(path)
    assert any(rate for rate in vars(config.train.learning_rate).values())
    assert config.data.sources
    assert config.model or config.init_from


@pytest.mark.parametrize("path", YAMLS, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_every_recipe_that_starts_from_a_stage_names_one_that_a_recipe_writes(path: Path) -> None:
    written = {load_config(other).train.output_dir for other in YAMLS}
    config = load_config(path)
    assert config.init_from is None or config.init_from in written


def test_all_unknown_keys_are_told_at_once_with_path_and_suggestion(write) -> None:
    text = mistakes(
        write(
            model={**GOOD["model"], "vision_encodr": "x", "connector": {"type": "mlp", "deph": 3}},
            data={**GOOD["data"], "sources": [{"format": "llava", "path": "a", "image_dri": "b"}]},
            train={**GOOD["train"], "learning_rates": {"connector": 1}, "lora": {"rnak": 3}},
            reusme=True,
        )
    )
    for where, meant in (
        ("model.vision_encodr", "vision_encoder"),
        ("deph", "depth"),
        ("image_dri", "image_dir"),
        ("train.learning_rates", "learning_rate"),
        ("train.lora.rnak", "rank"),
        ("reusme", "resume"),
    ):
        line = next(line for line in text.splitlines() if where in line)
        assert "unknown key" in line
        assert f"did you mean '{meant}'" in line


def test_key_that_is_like_nothing_gets_no_suggestion(write) -> None:
    text = mistakes(write(zzzqqq=1))
    assert "zzzqqq: unknown key" in text
    assert "did you mean" not in text


@pytest.mark.parametrize(
    ("section", "wrong", "said"),
    [
        ("data", {"seq_length": "long"}, "data.seq_length"),
        ("data", {"image_fit": "stretch"}, "data.image_fit"),
        ("train", {"output_dir": "x", "schedule": "linear"}, "train.schedule"),
        ("train", {"output_dir": "x", "mixed_precision": "fp8"}, "train.mixed_precision"),
        ("train", {"steps": 3}, "train.output_dir"),
        ("train", {"output_dir": "x", "epochs": 0}, "train.epochs"),
        ("train", {"output_dir": "x", "epochs": float("inf")}, "train.epochs"),
        ("train", {"output_dir": "x", "learning_rate": {"llm": float("inf")}}, "train.learning_rate.llm"),
        ("model", {"llm": "x"}, "model.vision_encoder"),
        ("model", {**GOOD["model"], "connector": {"type": "transformer"}}, "model.connector"),
        ("data", {"sources": [{"format": "parquet", "path": "x"}]}, "data.sources.0"),
        ("train", None, "train"),
    ],
)
def test_wrong_value_is_told_with_its_path(write, section: str, wrong: Any, said: str) -> None:
    assert said in mistakes(write(**{section: wrong}))


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("train", "rows_per_step", 0),
        ("train", "rows_per_micro_batch", 0),
        ("train", "rows_per_micro_batch", -2),
        ("train", "steps", -1),
        ("train", "save_every", -5),
        ("train", "warmup", 1.5),
        ("train", "learning_rate", {"connector": -1e-3}),
    ],
)
def test_number_out_of_its_range_is_told_with_its_path(write, section: str, key: str, value: Any) -> None:
    assert f"{section}.{key}" in mistakes(write(**{section: {**GOOD[section], key: value}}))


@pytest.mark.parametrize("text", ["a: [1, 2", "- 1\n- 2", "just words", "\t- x: 1", "", "42"])
def test_file_that_is_no_mapping_is_one_readable_error(write, text: str) -> None:
    assert "Traceback" not in mistakes(write(text))


def test_missing_file_is_named() -> None:
    with pytest.raises(ValueError, match=r"no config file nowhere/run\.yaml"):
        load_config(Path("nowhere/run.yaml"))


@pytest.mark.parametrize("number", ["1e-3", "1E-3", "1.0e-3", "0.001", "+1e-3", "1.e-3"])
def test_number_with_an_exponent_is_a_number(write, number: str) -> None:
    raw = "train: {output_dir: x, learning_rate: {connector: %s}}" % number  # noqa: UP031
    assert load_config(write(raw)).train.learning_rate.connector == 1e-3


@pytest.mark.parametrize("word", ["e3", "1e", "12e3x", "llama-1e-3"])
def test_word_that_is_like_a_number_stays_a_word(write, word: str) -> None:
    assert load_config(write(model={"vision_encoder": "x", "llm": word})).model.llm == word


@pytest.mark.parametrize(
    ("name", "kind"), [("linear", LinearConnector), ("mlp", MLPConnector), ("qformer", QFormerConnector)]
)
def test_connector_is_chosen_by_its_type(write, name: str, kind: type) -> None:
    config = load_config(write(model={**GOOD["model"], "connector": {"type": name}}))
    assert config.model.connector == kind()


def test_field_of_another_connector_is_an_error(write) -> None:
    text = mistakes(write(model={**GOOD["model"], "connector": {"type": "mlp", "num_queries": 32}}))
    assert "num_queries: unknown key" in text


def test_dump_then_load_gives_the_same_config(write, tmp_path: Path) -> None:
    for path in [write(), *(path for path in YAMLS if load_config(path).model)]:
        config = load_config(path)
        (tmp_path / "again.yaml").write_text(dump_config(config))
        assert load_config(tmp_path / "again.yaml") == config


def test_dump_leaves_out_how_the_run_was_started(write) -> None:
    config = load_config(write())
    config.overwrite = config.dry_run = True
    assert not {"overwrite", "dry_run", "resume"} & yaml.safe_load(dump_config(config)).keys()


def test_parts_of_an_earlier_stage_are_taken_and_written_down(write, tmp_path: Path) -> None:
    (tmp_path / "align").mkdir()
    (tmp_path / "align" / "config.yaml").write_text(dump_config(load_config(write())))
    second = {key: value for key, value in GOOD.items() if key != "model"}
    config = load_config(write(yaml.safe_dump({**second, "init_from": str(tmp_path / "align")})))
    assert config.model is None
    assert config.parts().llm == "b/llm"
    assert yaml.safe_load(dump_config(config))["model"]["llm"] == "b/llm"


def test_config_without_any_model_says_how_to_give_one() -> None:
    with pytest.raises(ValueError, match=r"`model`.*`init_from`"):
        RunConfig(train=TrainConfig(output_dir=Path("x"))).parts()


def test_stage_that_is_no_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no stage folder"):
        RunConfig(train=TrainConfig(output_dir=Path("x")), init_from=tmp_path).parts()


def test_defaults_are_valid_by_their_own_rules() -> None:
    TypeAdapter(RunConfig).validate_python({"train": {"output_dir": "x"}})


# ---------------------------------------------------------------- flags


def test_flags_override_the_yaml_and_the_yaml_overrides_defaults(write) -> None:
    config = parse(
        ["--config", str(write()), "--train.learning_rate.connector", "2e-4", "--data.seq_length", "64", "--dry_run"]
    )
    assert config.train.learning_rate.connector == 2e-4
    assert config.data.seq_length == 64
    assert config.dry_run
    assert config.train.lora.rank == 8
    assert config.train.lora.alpha == 32


@pytest.mark.parametrize(
    ("flag", "value", "read"),
    [
        ("--train.steps", "10", lambda c: c.train.steps == 10),
        ("--train.lora.rank", "4", lambda c: c.train.lora.rank == 4),
        ("--train.output_dir", "runs/y", lambda c: c.train.output_dir == Path("runs/y")),
        ("--model.llm", "c/llm", lambda c: c.model.llm == "c/llm"),
        ("--model.connector.depth", "3", lambda c: c.model.connector.depth == 3),
        ("--data.sources.0.path", "other.json", lambda c: c.data.sources[0].path == Path("other.json")),
        ("--data.packing", "False", lambda c: not c.data.packing),
        ("--init_from", "runs/align", lambda c: c.init_from == Path("runs/align")),
        ("--train.save_every", "5", lambda c: c.train.save_every == 5),
        ("--train.learning_rate.llm", "1e-5", lambda c: c.train.learning_rate.llm == 1e-5),
    ],
)
def test_flag_reaches_its_field(write, flag: str, value: str, read: Any) -> None:
    arguments = ["--data.no-packing"] if flag == "--data.packing" else [flag, value]
    assert read(parse(["--config", str(write()), *arguments]))


def test_flag_may_be_joined_with_an_equals_sign(write) -> None:
    assert parse([f"--config={write()}", "--train.steps=7"]).train.steps == 7


@pytest.mark.parametrize("flags", [["--train.stepz", "3"], ["--train.steps", "many"], ["--nonsense"]])
def test_mistaken_flag_ends_the_program_in_words(write, flags: list[str], capsys: Any) -> None:
    with pytest.raises(SystemExit) as ended:
        parse(["--config", str(write()), *flags])
    assert ended.value.code not in (0, None)
    assert "Traceback" not in capsys.readouterr().err


def test_flag_out_of_its_range_ends_the_program_in_words(write, capsys) -> None:
    with pytest.raises(SystemExit) as ended:
        parse(["--config", str(write()), "--train.rows_per_step", "0"])
    assert ended.value.code == 2
    assert "train.rows_per_step" in capsys.readouterr().err


def test_flag_reaches_what_the_file_leaves_out(write) -> None:
    config = parse(["--config", str(write()), "--train.lora.rank", "8", "--train.lora.dropout=0.1"])
    assert config.train.lora is not None
    assert (config.train.lora.rank, config.train.lora.dropout) == (8, 0.1)


def test_flag_chooses_another_connector_whatever_the_order(write) -> None:
    flags = ["--model.connector.num_queries", "6", "--model.connector.type", "qformer"]
    config = parse(["--config", str(write()), *flags])
    assert config.parts().connector.num_queries == 6


def test_flag_with_an_unknown_key_suggests_the_right_one(write, capsys) -> None:
    with pytest.raises(SystemExit):
        parse(["--config", str(write()), "--train.rows_per_stepp", "4"])
    assert "did you mean 'rows_per_step'" in capsys.readouterr().err


def test_flag_changes_one_part_of_the_earlier_stages_model(tmp_path: Path) -> None:
    stage = tmp_path / "align"
    stage.mkdir()
    (stage / "config.yaml").write_text("model: {vision_encoder: a/b, llm: c/d}\ntrain: {output_dir: x}\n")
    (tmp_path / "f.yaml").write_text(f"init_from: {stage}\ntrain: {{output_dir: y}}\n")
    config = parse(["--config", str(tmp_path / "f.yaml"), "--model.dtype", "bfloat16"])
    assert (config.parts().vision_encoder, config.parts().dtype) == ("a/b", "bfloat16")


def test_bad_yaml_ends_the_program_with_all_its_mistakes(write, capsys) -> None:
    with pytest.raises(SystemExit) as ended:
        parse(["--config", str(write(reusme=True, zzz=1))])
    told = capsys.readouterr().err
    assert ended.value.code == 2
    assert "reusme" in told
    assert "zzz" in told


def test_missing_yaml_ends_the_program_in_words(capsys) -> None:
    with pytest.raises(SystemExit) as ended:
        parse(["--config", "nowhere.yaml"])
    assert ended.value.code == 2
    assert "nowhere.yaml" in capsys.readouterr().err


def test_an_option_without_its_format_is_told_to_name_it(write) -> None:
    path = write(data={"sources": [{"path": "data.json", "bare": True}]})
    assert "data.sources.0.bare: an option of one format: name it" in mistakes(path)


@pytest.mark.parametrize(
    ("section", "told"),
    [
        ({"sources": [{"paht": "data.json"}]}, "data.sources.0.paht: unknown key, did you mean 'path'?"),
        ({"sources": ["data.json"]}, "data.sources.0: expected a mapping .* found 'data.json': write {path: FILE}"),
        ({"sources": [{"path": "a", "format": "llvaa"}]}, "data.sources.0: no format 'llvaa': did you mean 'llava'?"),
        ({"sources": [{"path": "a"}], "mixture": {"shares": [{}, {}]}}, "shares has 2 entries for 1 sources"),
    ],
    ids=str,
)
def test_a_mistake_in_a_source_is_told_in_words(write, section: dict[str, Any], told: str) -> None:
    assert re.search(told, mistakes(write(data=section)))


def test_a_connector_of_no_kind_is_told_with_the_nearest(write) -> None:
    path = write(model={"vision_encoder": "a/b", "llm": "c/d", "connector": {"type": "mpl"}})
    assert "model.connector: no type 'mpl': did you mean 'mlp'? There are linear, mlp" in mistakes(path)


def test_the_yaml_of_the_readme_is_valid() -> None:
    blocks = re.findall(r"```yaml\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert blocks
    for block in blocks:
        raw = yaml.safe_load(block)
        config = validate({**raw, "train": {"output_dir": "x", **raw.get("train", {})}}, "README.md")
        assert len(config.data.sources) == len(config.data.mixture.shares)
