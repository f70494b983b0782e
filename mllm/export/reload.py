"""Run in a fresh process: does the exported folder load without mllm, and say what the trained model said?

    python -I reload.py FOLDER REFERENCE [PACKAGES]

Enters: an exported folder; a folder with `reference.json` (conversations, our token ids, our answers) and
`reference.safetensors` (our pixels and logits); if wanted, a folder of packages that come first on the path (an older
transformers). Leaves: one line of JSON on stdout. Imports torch, transformers and safetensors; mllm is made
impossible to import.
"""

from __future__ import annotations

import json
import os
import platform
import sys
import traceback
from typing import Any


class Absent:
    """mllm may be installed here; in this process it is not."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name.partition(".")[0] == "mllm":
            raise ModuleNotFoundError(f"{name} is shut out of this process", name=name)


def main() -> None:
    folder, reference, *packages = sys.argv[1:]
    sys.path[:0] = packages
    sys.meta_path.insert(0, Absent())
    try:
        print(json.dumps(compare(folder, reference)))
    except Exception as error:
        print(json.dumps({**versions(), "error": f"{type(error).__name__}: {error}", "trace": traceback.format_exc()}))


def versions() -> dict[str, str]:
    import torch
    import transformers

    return {"transformers": transformers.__version__, "torch": torch.__version__, "python": platform.python_version()}


def compare(folder: str, reference: str) -> dict[str, Any]:
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModelForImageTextToText, AutoProcessor
    from transformers.utils import logging

    logging.set_verbosity_error()
    torch.manual_seed(0)
    adapter = folder if os.path.exists(f"{folder}/adapter_config.json") else ""
    folder = f"{folder}/base" if adapter else folder
    with open(f"{folder}/config.json") as file:
        options = {"trust_remote_code": True} if "auto_map" in json.load(file) else {}
    with open(f"{reference}/reference.json") as file:
        told = json.load(file)
    ours = load_file(f"{reference}/reference.safetensors")
    processor = AutoProcessor.from_pretrained(folder, **options)
    loaded: Any = AutoModelForImageTextToText.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True, **options
    )
    model, keys = loaded
    name, module = type(model).__name__, type(model).__module__
    if adapter:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, adapter)
    model.eval()
    found: dict[str, Any] = {**versions(), "class": name, "module": module, "keys": problems(keys), "samples": []}
    with torch.inference_mode():
        for number, sample in enumerate(told["samples"]):
            own = {k.partition("/")[2]: v for k, v in ours.items() if k.startswith(f"{number}/")}
            found["samples"].append(one(model, processor, sample, own))
    found["mllm"] = "mllm" in sys.modules
    return found


def problems(keys: dict[str, Any]) -> dict[str, list[str]]:
    """What did not find its place; a model with random weights still answers."""
    names = ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")
    return {name: sorted(map(str, keys[name]))[:8] for name in names if keys.get(name)}


def one(model: Any, processor: Any, sample: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """One conversation, through their processor and their model."""
    inputs = processor.apply_chat_template(
        sample["messages"], add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    result: dict[str, Any] = {"input_ids": inputs["input_ids"][0].tolist() == sample["input_ids"], "pixels": 0.0}
    if not result["input_ids"]:
        return {**result, "expected": sample["input_ids"], "found": inputs["input_ids"][0].tolist()}
    if "pixel_values" in own:
        theirs = inputs["pixel_values"]
        ours = stacked(own["pixel_values"], sample["tiles"], theirs) if sample.get("tiles") else own["pixel_values"]
        result["pixels"] = (theirs.reshape(ours.shape) - ours).abs().max().item()
        inputs["pixel_values"] = ours.reshape(theirs.shape)
    logits = model(**inputs).logits[0].float()[:, : own["logits"].shape[1]]
    scale = max(1.0, own["logits"].abs().max().item())
    result["logits"] = (logits - own["logits"]).abs().max().item() / scale
    new = model.generate(**inputs, max_new_tokens=sample["max_new_tokens"], do_sample=False)
    words = processor.decode(new[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
    return {**result, "answer": words, "same_answer": words == sample["answer"]}


def stacked(pixels: Any, tiles: list[int], like: Any) -> Any:
    """[N, 3, H, W] of all tiles -> [images, most tiles, 3, H, W], as `like` is, zeros behind the last of an image."""
    whole, start = like.new_zeros(len(tiles), max(tiles), *like.shape[2:]), 0
    for image, number in zip(whole, tiles):  # noqa: B905
        image[:number] = pixels[start : start + number]
        start += number
    return whole


if __name__ == "__main__":
    main()
