"""The tokenizer as llama.cpp's: byte-level BPE with one of the ways to split words that it knows by name.

Enters: a `Trained`. Leaves: settings: tokens with their types, merges, marks, chat template.
"""

from __future__ import annotations

import json
from typing import Any

from mllm.data import chat
from mllm.export.trained import Trained
from mllm.generate import stop_ids
from mllm.types import Message

QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPLITS = {
    (): "gpt-2",
    (QWEN2,): "qwen2",
    (QWEN2.replace(r"\p{N}|", r"\p{N}{1,3}|"),): "llama-bpe",
    ("digits",): "smollm",
}
"""What stands before the bytes of a tokenizer -> llama.cpp's name for it (its `llama-vocab.cpp`)."""


def vocabulary_obstacles(tokenizer: Any) -> list[str]:
    """Why llama.cpp could not tokenize alike; nothing if it can."""
    whole = json.loads(tokenizer.backend_tokenizer.to_str())
    if whole["model"]["type"] != "BPE" or whole["model"].get("byte_fallback"):
        return [f"a tokenizer of kind {whole['model']['type']} with byte fallback or pieces (known: byte-level BPE)"]
    if splits(whole) is None:
        return [f"a tokenizer that splits words in a way without a name in llama.cpp: {whole['pre_tokenizer']}"]
    return []


def splits(whole: dict[str, Any]) -> str | None:
    """llama.cpp's name for the way in which words are split."""
    first = whole.get("pre_tokenizer") or {}
    steps = first["pretokenizers"] if first.get("type") == "Sequence" else [first]
    if not steps or steps[-1].get("type") != "ByteLevel":
        return None
    before: list[str] = []
    for step in steps[:-1]:
        if step["type"] == "Digits" and step.get("individual_digits"):
            before.append("digits")
        else:
            before.append((step.get("pattern") or {}).get("Regex", step["type"]))
    by_words = bool(steps[-1].get("use_regex", True))
    return SPLITS.get(tuple(before)) if by_words == (before in ([], ["digits"])) else None


def vocabulary(trained: Trained, rows: int) -> list[tuple[Any, ...]]:
    """All settings of the tokenizer; as many tokens as the embedding table has rows."""
    import gguf

    tokenizer = trained.processor.tokenizer
    whole = json.loads(tokenizer.backend_tokenizer.to_str())
    tokens = [f"[PAD{number}]" for number in range(rows)]
    types = [int(gguf.TokenType.UNUSED)] * rows
    for token, number in whole["model"]["vocab"].items():
        if number < rows:
            tokens[number], types[number] = token, int(gguf.TokenType.NORMAL)
    for added in whole["added_tokens"]:
        if added["id"] < rows:
            kind = gguf.TokenType.CONTROL if added["special"] else gguf.TokenType.USER_DEFINED
            tokens[added["id"]], types[added["id"]] = added["content"], int(kind)
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in whole["model"]["merges"]]
    split = splits(whole)
    assert split is not None
    return [
        ("add_tokenizer_model", "gpt2"),
        ("add_tokenizer_pre", split),
        ("add_token_list", tokens),
        ("add_token_types", types),
        ("add_token_merges", merges),
        ("add_add_space_prefix", bool((last_step(whole)).get("add_prefix_space"))),
        *marks(trained),
    ]


def last_step(whole: dict[str, Any]) -> dict[str, Any]:
    first = whole["pre_tokenizer"]
    return dict(first["pretokenizers"][-1] if first["type"] == "Sequence" else first)


def marks(trained: Trained) -> list[tuple[Any, ...]]:
    """Begin, end and padding, and the chat template. The template prints the begin mark, or there is none."""
    tokenizer, template = trained.processor.tokenizer, trained.processor.tokenizer.chat_template
    prompt = chat.render(tokenizer, [Message("user", ["a"])], prompt=True)
    begins = bool(tokenizer.bos_token) and prompt.startswith(tokenizer.bos_token)
    ends = stop_ids(trained.model, trained.processor)
    found: list[tuple[Any, ...]] = [("add_add_bos_token", begins)]
    found += [(f"add_{name}_token_id", number) for name, number in zip(("eos", "eot"), ends, strict=False)]
    if tokenizer.bos_token_id is not None:
        found.append(("add_bos_token_id", tokenizer.bos_token_id))
    if tokenizer.pad_token_id is not None:
        found.append(("add_pad_token_id", tokenizer.pad_token_id))
    found.append(("add_chat_template", template if isinstance(template, str) else template["default"]))
    return found
