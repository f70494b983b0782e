"""Train a small causal LLM on words alone: scenes told in words, questions about them.

Enters: `texts.jsonl` and the tokenizer in `OUT/llm`. Leaves: the LLM beside it, an ordinary Qwen3 folder.

Shapes: B rows, S tokens in a row, D width.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from training import Report, batches, fit, read_lines

IGNORE_INDEX = -100
LAYERS = 2
"""One to gather what is asked, one to look it up."""


def train_llm(data: Path, out: Path, steps: int, layers: int = LAYERS) -> Report:
    """Learn to answer from a scene told in words, where a picture's tokens will stand later."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(out / "llm")
    input_ids, labels, position_ids = pack(encode(tokenizer, read_lines(data / "texts.jsonl")), length=128)
    model = build_llm(tokenizer, layers=layers).train()
    order = batches(len(input_ids), batch=32)

    def next_loss() -> Tensor:
        rows = next(order)
        # no mask and no cache: positions that restart are how transformers keeps packed chats apart
        inputs = {"input_ids": input_ids[rows], "position_ids": position_ids[rows]}
        states = model.model(**inputs, use_cache=False).last_hidden_state  # [B, S, D]
        following = labels[rows][:, 1:]
        said = following != IGNORE_INDEX
        return nn.functional.cross_entropy(model.lm_head(states[:, :-1][said]), following[said])

    report = fit(model, next_loss, steps, "llm")
    model.save_pretrained(out / "llm")
    return report


def build_llm(
    tokenizer: PreTrainedTokenizerFast, width: int = 128, layers: int = LAYERS, heads: int = 8
) -> Qwen3ForCausalLM:
    """In as many steps, more layers learned less."""
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=32,
        max_position_embeddings=1024,
        initializer_range=0.8 / math.sqrt(width),  # the usual 0.02 suits a width in the thousands
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return Qwen3ForCausalLM(config)


Chat = tuple[list[int], list[int]]
"""Token ids, and their labels: the assistant's words and the end of its turn."""


def encode(tokenizer: PreTrainedTokenizerFast, chats: list[dict[str, Any]]) -> Iterator[Chat]:
    encoded = tokenizer.apply_chat_template(
        [chat["messages"] for chat in chats], return_dict=True, return_assistant_tokens_mask=True
    )
    for tokens, spoken in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True):
        yield tokens, [token if said else IGNORE_INDEX for token, said in zip(tokens, spoken, strict=True)]


def pack(chats: Iterator[Chat], length: int) -> tuple[Tensor, Tensor, Tensor]:
    """Whole chats side by side, first come first served: input_ids, labels, position_ids [B, length]."""
    rows: list[list[Chat]] = [[]]
    used = 0
    for chat in chats:
        if used + len(chat[0]) > length:
            rows.append([])
            used = 0
        rows[-1].append(chat)
        used += len(chat[0])
    input_ids = [[token for tokens, _ in row for token in tokens] for row in rows]
    labels = [[label for _, row_labels in row for label in row_labels] for row in rows]
    positions = [[position for tokens, _ in row for position in range(len(tokens))] for row in rows]
    return fill(input_ids, 0, length), fill(labels, IGNORE_INDEX, length), fill(positions, 0, length)


def fill(rows: list[list[int]], value: int, length: int) -> Tensor:
    return torch.tensor([row + [value] * (length - len(row)) for row in rows])
