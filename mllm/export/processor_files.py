"""The processor as stock files: tokenizer, image processor, chat template, and how many tokens an image becomes.

Enters: our `Processor`. Leaves: a folder that `AutoProcessor` of transformers 4.57 and 5.x reads as a stock
`LlavaProcessor`: it expands an image's placeholder into exactly V, whatever the connector makes of P patches. Where
tiles are laid out at any resolution it is a `LlavaNextProcessor`, which counts and cuts as `any_resolution.py` does.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mllm.any_resolution import AnyResolution
from mllm.data import chat
from mllm.data.imaging.pixels import Resize
from mllm.data.processor import Processor
from mllm.export.template import with_parts
from mllm.types import IMAGE_TOKEN, Message

WRITTEN_BY_5 = ("backend", "is_local", "local_files_only", "name_or_path", "tokenizer_file", "processor_class")
"""Notes of transformers 5 in `tokenizer_config.json` that mean nothing elsewhere."""
LOADS_FILES = ("CLIPImageProcessor", "SiglipImageProcessor")
"""Image processors that in 4.57 take what a chat template hands them: names of files."""


def write(
    processor: Processor, folder: Path, llm: str, patch_size: int, select_strategy: str, as_bytes: bool = False
) -> None:
    """All files of the processor. `llm` names where the tokenizer came from; `as_bytes`: pixels stay uint8."""
    write_tokenizer(processor.tokenizer, folder, original_class(llm))
    write_image_processor(processor, folder, as_bytes)
    counting = {"patch_size": patch_size, "vision_feature_select_strategy": select_strategy}
    counting["num_additional_image_tokens"] = additional_tokens(processor, patch_size, select_strategy)
    facts = {"processor_class": processor_class(processor), "image_token": IMAGE_TOKEN, **counting}
    write_json(folder / "processor_config.json", facts)


def processor_class(processor: Processor) -> str:
    return "LlavaNextProcessor" if processor.slots.any_resolution else "LlavaProcessor"


def patch_of_tokens(layout: AnyResolution) -> int:
    """The side of a patch with which LlavaNextProcessor counts as many tokens across a tile as the connector makes.

    Raises:
        ValueError: there is none.
    """
    patch = layout.side // layout.across
    if layout.side // patch != layout.across:
        raise ValueError(
            f"{layout.across} visual tokens across a tile of {layout.side} pixels: LlavaNextProcessor can count "
            f"{layout.side // patch}; choose another number of tokens, or another encoder"
        )
    return patch


def additional_tokens(processor: Processor, patch_size: int, select_strategy: str) -> int:
    """What LlavaProcessor adds to its own count of patches to come to V."""
    _, height, width = processor.pixel_shape
    counted = (height // patch_size) * (width // patch_size) - (select_strategy == "default")
    return processor.num_visual_tokens - counted


def original_class(llm: str) -> str:
    """The tokenizer class that the LLM was published with; transformers 5 would write one that 4.57 does not know."""
    from transformers.utils import cached_file

    found = cached_file(llm, "tokenizer_config.json", _raise_exceptions_for_missing_entries=False)
    named = json.loads(Path(found).read_text()).get("tokenizer_class") if found else None
    return named if named and named != "TokenizersBackend" else "PreTrainedTokenizerFast"


def write_tokenizer(tokenizer: Any, folder: Path, name: str) -> None:
    """Tokenizer files that both versions read, and the chat template beside them."""
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    config = {k: v for k, v in json.loads(path.read_text()).items() if k not in WRITTEN_BY_5}
    extra = config.pop("extra_special_tokens", None)  # 4.57 expects a mapping under this name
    if isinstance(extra, list):
        config["additional_special_tokens"] = extra
    config["tokenizer_class"] = name
    # 4.57's generic class would also make token_type_ids, which no causal LLM takes
    config["model_input_names"] = ["input_ids", "attention_mask"]
    # 4.57 sets the pre-tokenizer to this, and takes its absence for False
    pre_tokenizer = json.loads(tokenizer.backend_tokenizer.to_str()).get("pre_tokenizer") or {}
    config.setdefault("add_prefix_space", bool(pre_tokenizer.get("add_prefix_space")))
    if adds_tokens_of_its_own(tokenizer):
        config["add_bos_token"] = config["add_eos_token"] = False
        whole = json.loads((folder / "tokenizer.json").read_text())
        write_json(folder / "tokenizer.json", {**whole, "post_processor": None})
    write_json(path, config)
    template = tokenizer.chat_template
    (folder / "chat_template.jinja").write_text(
        with_parts(template if isinstance(template, str) else template["default"])
    )


def adds_tokens_of_its_own(tokenizer: Any) -> bool:
    """Would a stock processor put a begin mark in front of our prompt? It does unless the prompt begins with one."""
    prompt = chat.render(tokenizer, [Message("user", ["a"])], prompt=True)
    adds = tokenizer(prompt)["input_ids"] != tokenizer(prompt, add_special_tokens=False)["input_ids"]
    return adds and not (tokenizer.bos_token and prompt.startswith(tokenizer.bos_token))


def write_image_processor(processor: Processor, folder: Path, as_bytes: bool) -> None:
    """`preprocessor_config.json`: the encoder's own, padding first where training padded.

    A `crop_size` is written also where nothing is cropped (SigLIP): vLLM's Transformers backend counts tokens by it.
    """
    processor.image_processor.save_pretrained(folder)
    path = folder / "preprocessor_config.json"
    config = json.loads(path.read_text())
    if isinstance(processor.transform.to_pixels, Resize) and config["image_processor_type"] not in LOADS_FILES:
        config["image_processor_type"] = "CLIPImageProcessor"  # the same steps, and 4.57's opens files too
    if not config.get("crop_size"):
        _, height, width = processor.pixel_shape
        config["crop_size"] = {"height": height, "width": width}
        config["do_center_crop"] = False
    if processor.image_fit == "pad":
        config |= {"image_processor_type": "LlavaImageProcessor", "do_pad": True}
    if processor.slots.any_resolution:
        config |= tiled(processor)
    if as_bytes:
        config |= {"do_rescale": False, "do_normalize": False}
    config["processor_class"] = processor_class(processor)
    write_json(path, config)


def tiled(processor: Processor) -> dict[str, Any]:
    """What LlavaNext's image processor must be told: tiles come to it at their size already."""
    layout = processor.slots.any_resolution
    assert layout is not None
    return {
        "image_processor_type": "LlavaNextImageProcessor",
        "image_grid_pinpoints": layout.pinpoints(),
        "size": {"shortest_edge": layout.side},
        "crop_size": {"height": layout.side, "width": layout.side},
        "resample": int(processor.transform.resample),
        "do_resize": True,
        "do_center_crop": True,
        "do_pad": True,
    }


def write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")
