"""Do the tokens that a chat template prints mean anything to the LLM? Asked of its embedding table before a run.

Enters: a causal LLM, the template's own tokens and their ids. Leaves: those whose rows look as if no text had ever
trained them; or a `ValueError` where there is no row at all. Base models keep rows for tokens to come (Llama 3 nearly
zeros), a tokenizer may know tokens that its model does not: both run, and the model stumbles over every turn.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

SHORT = 0.1
"""A row shorter than this share of the median row: reserved rows are zeros nearly, trained ones differ by a few."""


def untrained_tokens(llm: Any, tokens: Mapping[str, int]) -> list[str] | None:
    """The tokens whose rows look untrained; None where the table cannot be looked at, because it is read later.

    Raises:
        ValueError: a token has no row.
    """
    table: Tensor = llm.get_input_embeddings().weight.detach()  # [vocabulary, D]
    if not len(table):  # cut up over ranks
        return None
    missing = [token for token, number in tokens.items() if number >= len(table)]
    if missing:
        raise ValueError(
            f"the chat template prints {', '.join(missing)}, but the embedding table of {type(llm).__name__} has "
            f"{len(table)} rows and none for that: take the tokenizer of this LLM, or a template in words it knows"
        )
    if table.is_meta:  # without values
        return None
    lengths = table.float().norm(dim=-1)  # [vocabulary]
    return [token for token, number in tokens.items() if lengths[number] < SHORT * lengths.median()]
