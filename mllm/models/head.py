"""What some LLM families put behind their head.

Enters: the head's product [..., vocabulary] and the LLM's config. Leaves: the logits as the family's own class gives
them. Whoever calls the head without that class (the loss, which needs few rows; the exported model) comes through here.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

BEHIND = ("final_logit_softcapping", "logit_scale", "logits_scaling")
"""Gemma 2's cap, Cohere's factor, Granite's divisor."""


def scaled(logits: Tensor, config: Any) -> Tensor:
    """[..., vocabulary] -> the same, with the family's cap, factor or divisor."""
    cap, factor, divisor = (getattr(config, name, None) for name in BEHIND)
    if cap:
        logits = torch.tanh(logits / cap) * cap
    if factor:
        logits = logits * factor
    if divisor:
        logits = logits / divisor
    return logits
