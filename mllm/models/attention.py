"""Does an LLM keep packed samples apart? Asked of the LLM itself before a run, because families differ in silence.

Enters: a causal LLM. Leaves: nothing, or a `ValueError`. Llama, Qwen, Mistral, Gemma, Phi, ... read from position_ids
that a row holds several samples. OPT, Falcon, Bloom, MPT and LLMs with a state (Mamba, Falcon-H1, Qwen3-Next) do not:
they run, and each sample sees the ones in front of it.

S tokens of a row, D width of the LLM.
"""

from __future__ import annotations

import copy
from typing import Any

import torch

LENGTH = 4
"""Tokens of each of the two samples that are tried."""


def check_isolation(llm: Any) -> None:
    """Two short samples in one row: the second one's hidden states must not depend on the first one.

    Raises:
        ValueError: they do, so rows of several samples would be learned wrongly.
    """
    table = llm.get_input_embeddings().weight
    if table.is_meta:
        return check_isolation(shrunk_twin(llm))
    drawn = torch.randn(1, 2 * LENGTH, table.shape[1], generator=torch.Generator().manual_seed(0))
    row = drawn.to(table.device, table.dtype).requires_grad_()  # [1, S, D]
    positions = torch.arange(LENGTH, device=table.device).repeat(2)[None]
    with torch.enable_grad():
        states = llm.get_decoder()(inputs_embeds=row, position_ids=positions, use_cache=False).last_hidden_state
        # a plain sum would vanish behind a final LayerNorm: weigh each number differently
        second = (states[:, LENGTH:] * torch.linspace(-1, 1, states.shape[-1], device=states.device)).sum()
    (seen,) = torch.autograd.grad(second, row)
    if seen[:, :LENGTH].any():
        raise ValueError(
            f"{class_of(llm)} lets packed samples see each other (it does not read position_ids that restart): "
            f"set data.packing to false, or take another LLM"
        )


def check_rotation(llm: Any, longest: int) -> None:
    """Samples of up to `longest` tokens beside each other must be rotated as each is alone.

    Two kinds of rotary positions do not do that: `longrope` (Phi-3 of long context) and `dynamic` change the
    frequencies of a whole batch once one position in it is beyond those of pretraining.

    Raises:
        ValueError: the LLM has one of these, and a sample is that long.
    """
    config = llm.config.get_text_config()
    rope: dict[str, Any] = getattr(config, "rope_parameters", None) or {}
    kind = str(rope.get("rope_type"))
    learned = getattr(config, "max_position_embeddings", None)
    limits = {"longrope": rope.get("original_max_position_embeddings"), "dynamic": learned}
    if (limit := limits.get(kind)) and longest > limit:
        raise ValueError(
            f"{class_of(llm)} has {kind} positions, which turn otherwise for a whole micro-batch once a sample in "
            f"it is longer than {limit} tokens, and the longest here has {longest}: samples would change each other. "
            f"Set data.seq_length to at most {limit}"
        )


def check_length(llm: Any, longest: int) -> str:
    """Samples of up to `longest` tokens must not be longer than what the LLM has positions for.

    Returns:
        a warning, where it counts on but has learned no position that late; or nothing.

    Raises:
        ValueError: its positions are rows of a table (GPT-2), which ends before.
    """
    learned, ends = outgrown(llm, longest)
    if not learned:
        return ""
    told = f"a sample of {longest:,} tokens, and {class_of(llm)} has learned {learned:,} positions"
    if ends:
        raise ValueError(f"{told}, rows of a table that ends there: set data.seq_length to at most {learned}")
    return f"{told}: what comes later is new to it (data.seq_length {learned} would cut there)"


def check_prompt(llm: Any, length: int) -> str:
    """The same of a conversation that waits for its answer."""
    learned, ends = outgrown(llm, length)
    if not learned:
        return ""
    told = f"the conversation has {length:,} tokens, and {class_of(llm)} has learned {learned:,} positions"
    if ends:
        raise ValueError(f"{told}, rows of a table that ends there: ask with fewer words, turns or images")
    return f"{told}: what comes later is new to it"


def outgrown(llm: Any, longest: int) -> tuple[int, bool]:
    """How many positions the LLM has learned, where `longest` tokens are more, else 0; and whether it ends there."""
    learned = getattr(llm.config.get_text_config(), "max_position_embeddings", None)
    if not learned or longest <= learned:
        return 0, False
    words = llm.get_input_embeddings()
    tables = [part for part in llm.modules() if isinstance(part, torch.nn.Embedding) and part is not words]
    return learned, any(learned <= table.num_embeddings <= learned + 2 for table in tables)  # OPT's has two rows more


def class_of(llm: Any) -> str:
    """The name of its class, also below an adapter."""
    return type(llm.get_base_model() if hasattr(llm, "get_base_model") else llm).__name__


def shrunk_twin(llm: Any, **changes: Any) -> Any:
    """An LLM of the same config, drawn at random and without its many layers and words: of each kind of layer one.
    `changes` are made to its config."""
    from transformers import AutoModelForCausalLM

    config = copy.deepcopy(llm.config)
    text = config.get_text_config()
    kinds = getattr(text, "layer_types", None) or []
    kept = max([2, *(kinds.index(kind) + 1 for kind in set(kinds))])
    text.num_hidden_layers = min(kept, text.num_hidden_layers)
    if kinds:
        text.layer_types = kinds[:kept]
    text.vocab_size, text.pad_token_id = 8, None  # the check looks at hidden states alone
    if isinstance(getattr(text, "intermediate_size", None), int):
        text.intermediate_size = 8  # in an MLP no position meets another
    for name, value in changes.items():
        setattr(text, name, value)
    with torch.random.fork_rng():
        return AutoModelForCausalLM.from_config(
            config, dtype=llm.dtype, attn_implementation=config._attn_implementation
        )
