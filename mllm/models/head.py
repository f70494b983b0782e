"""What some LLM families put behind their head.

Enters: the head's product [..., vocabulary] and the LLM's config. Leaves: the logits as the family's own class gives
them. Whoever calls the head without that class (the loss, which needs few rows; the exported model) comes through here.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def scaled(logits: Tensor, config: Any) -> Tensor:
    """[..., vocabulary] -> the same, with the family's cap, factor or divisor."""
    if cap := getattr(config, "final_logit_softcapping", None):  # Gemma 2
        logits = torch.tanh(logits / cap) * cap
    if scale := getattr(config, "logit_scale", None):  # Cohere
        logits = logits * scale
    if divisor := getattr(config, "logits_scaling", None):  # Granite
        logits = logits / divisor
    return logits
