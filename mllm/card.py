"""The model card of a pushed model, made from what the run left and what the export proved.

Enters: a stage folder, an `Exported`, the repository's name. Leaves: the text of `README.md`: metadata that the Hub
reads, how to load the model, what it is made of, the recipe, the data with its counts, the figures, the versions.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from mllm.config import RunConfig, dump_config
from mllm.data.indexing.tally import sentence
from mllm.export import Exported
from mllm.oracle import Info

TAGS = ["mllm", "vision-language", "image-text-to-text"]
HOW = {
    "transformers": """\
from transformers import AutoModelForImageTextToText, AutoProcessor

processor = AutoProcessor.from_pretrained("{repo}"{trust})
model = AutoModelForImageTextToText.from_pretrained("{repo}"{trust})
question = [{{"type": "image", "url": "picture.jpg"}}, {{"type": "text", "text": "What is this?"}}]
inputs = processor.apply_chat_template(
    [{{"role": "user", "content": question}}],
    add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
)
answer = model.generate(**inputs, max_new_tokens=64)[0, inputs["input_ids"].shape[1]:]
print(processor.decode(answer, skip_special_tokens=True))""",
    "adapter": """\
from peft import PeftModel
from transformers import AutoModelForImageTextToText, AutoProcessor

processor = AutoProcessor.from_pretrained("{repo}", subfolder="base"{trust})
base = AutoModelForImageTextToText.from_pretrained("{repo}", subfolder="base"{trust})
model = PeftModel.from_pretrained(base, "{repo}")""",
}
COMMANDS = {
    "merged": "mllm chat --model {repo} --image picture.jpg --prompt 'What is this?'",
    "gguf": "llama-mtmd-cli -hf {repo} --image picture.jpg -p $'\\nWhat is this?'",
}


def card(repo: str, folder: Path, config: RunConfig, exported: Exported, info: Info) -> str:
    """The whole file."""
    parts = [
        f"---\n{yaml.safe_dump(metadata(config, exported), sort_keys=False)}---",
        f"# {repo.rpartition('/')[2]}",
        f"A multimodal LLM: {described(config)}. Written by `mllm export --to {exported.to}` as "
        f"{exported.architecture} ({exported.why}).",
        f"## Load it\n\n{loading(repo, exported)}",
        f"## Who can load it\n\n{table(info, exported)}",
        f"## Proven\n\n{listed(map(str, exported.proofs)) or 'Read back tensor for tensor; not run.'}",
        f"## Data\n\n{data(folder, config)}",
        f"## Figures\n\n{figures(folder)}",
        f"## Recipe\n\n```yaml\n{recipe(config)}```",
        f"## Versions\n\n{listed(versions())}",
    ]
    return "\n\n".join(parts) + "\n"


def metadata(config: RunConfig, exported: Exported) -> dict[str, Any]:
    """What the Hub reads. `library_name` is not detected, and several base models mean a merge unless it is said."""
    model = config.parts()
    found: dict[str, Any] = {"library_name": "peft" if exported.to == "adapter" else "transformers"}
    if exported.to in ("merged", "gguf"):
        found["library_name"] = {"merged": "mllm", "gguf": "llama.cpp"}[exported.to]
    found["pipeline_tag"] = "image-text-to-text"
    if bases := [name for name in (model.llm, *model.encoders()) if on_hub(name)]:
        found |= {"base_model": bases, "base_model_relation": "adapter" if exported.to == "adapter" else "finetune"}
    if sets := [name.removeprefix("hub:") for name in sources(config) if name.startswith("hub:")]:
        found["datasets"] = sets
    return {**found, "tags": TAGS}


def on_hub(name: str) -> bool:
    """A Hub id, not a folder of this machine, which nobody else has."""
    return name.count("/") == 1 and not name.startswith((".", "/", "~")) and not Path(name).exists()


def described(config: RunConfig) -> str:
    model = config.parts()
    encoders = " and ".join(short(name) for name in model.encoders())
    return f"{encoders} as eyes, a `{model.connector.type}` connector, {short(model.llm)} as LLM"


def short(name: str) -> str:
    """A Hub id as a link; of a local folder its last name alone."""
    return f"[{name}](https://huggingface.co/{name})" if on_hub(name) else f"`{Path(name).name}`"


def loading(repo: str, exported: Exported) -> str:
    if exported.to in COMMANDS:
        return f"```\n{COMMANDS[exported.to].format(repo=repo)}\n```"
    remote = any("trust_remote_code" in note for note in exported.notes)
    code = HOW[exported.to].format(repo=repo, trust=", trust_remote_code=True" if remote else "")
    return f"```python\n{code}\n```" + ("\n\n" + listed(exported.notes) if exported.notes else "")


def table(info: Info, exported: Exported) -> str:
    """The oracle's answers; they speak of the transformers and the GGUF form."""
    rows = "\n".join(
        f"| {loader.loader} {loader.version} | {'yes' if loader.loads else 'no'} | {loader.why} |"
        for loader in info.loaders
    )
    return (
        f"| | loads | how, or why not |\n|---|---|---|\n{rows}\n\n"
        f"{visual_tokens(info)} visual tokens an image. vLLM and SGLang were read, not run."
    )


def visual_tokens(info: Info) -> str:
    fewest, most = info.visual_tokens_range
    return str(most) if fewest == most else f"{fewest} to {most}"


def data(folder: Path, config: RunConfig) -> str:
    """Sources by name, and the ledger of the last stage."""
    told = listed(f"`{name.removeprefix('hub:')}`" for name in sources(config)) or "not recorded"
    ledger = folder / "ledger.json"
    return f"{told}\n\n{sentence(json.loads(ledger.read_text()))}" if ledger.is_file() else told


def sources(config: RunConfig) -> list[str]:
    """Hub data sets as `hub:OWNER/NAME`, files by their last name: paths of this machine are nobody's business."""
    paths = [str(getattr(source, "path", "")) for source in config.data.sources]
    return [path if path.startswith("hub:") else Path(path).name for path in paths if path]


def figures(folder: Path) -> str:
    """The last line of the metrics, and every evaluation that `mllm eval --json` left in the folder."""
    found = []
    metrics = folder / "metrics.jsonl"
    if metrics.is_file() and (lines := metrics.read_text().splitlines()):
        last = json.loads(lines[-1])
        loss = f", loss {last['loss']:.4f}" if isinstance(last.get("loss"), float) else ""
        found.append(f"training ended at step {last.get('step')}{loss}")
    for path in sorted(folder.glob("*.json")):
        told = json.loads(path.read_text())
        if isinstance(told, dict) and {"accuracy", "number"} <= told.keys():
            found.append(f"{path.stem}: {100 * told['accuracy']:.1f} % of {told['number']:,} questions")
    return listed(found) or "none recorded"


def recipe(config: RunConfig) -> str:
    """The merged config of the stage, without the places of this machine."""
    raw = yaml.safe_load(dump_config(config))
    raw["train"].pop("output_dir", None)
    for place in ("init_from", "init_parts"):
        raw.pop(place, None)
    for part in ("vision_encoder", "llm"):
        raw["model"][part] = without_place(raw["model"][part])
    raw["data"] = {k: v for k, v in raw["data"].items() if k not in ("sources", "index_dir")}
    return yaml.safe_dump(raw, sort_keys=False)


def without_place(name: Any) -> Any:
    if isinstance(name, list):
        return [without_place(one) for one in name]
    return name if on_hub(name) else Path(name).name


def versions() -> list[str]:
    from importlib.metadata import version

    return [f"{name} {version(name)}" for name in ("mllm", "transformers", "torch", "peft")]


def listed(lines: Any) -> str:
    return "\n".join(f"- {line}" for line in lines)
