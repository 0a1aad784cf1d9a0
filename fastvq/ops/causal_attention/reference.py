"""Causal attention in plain PyTorch: the definition, slow and differentiable any number of times."""

from __future__ import annotations

import torch
from torch import Tensor

from fastvq.ops.grid import Mask


def causal_attention_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    mask: Mask = "strict",
    dropout: float = 0.0,
    kept: Tensor | None = None,
) -> Tensor:
    """`fastvq.ops.causal_attention` in plain PyTorch, with all logits at once: the definition.

    Args:
        query, key, value, mask, dropout: as of `fastvq.ops.causal_attention`.
        kept: bool [B, heads, N, N], which logits dropout leaves; None: all.

    Returns:
        [B, heads, N, E].
    """
    logits = query @ key.transpose(-2, -1) * query.shape[-1] ** -0.5
    if kept is not None:
        logits = logits * kept / (1 - dropout)
    hidden = torch.ones(logits.shape[-2:], dtype=torch.bool, device=logits.device).triu(0 if mask == "strict" else 1)
    # Where nothing may be seen, a softmax would be NaN, and so would its gradient.
    blind = hidden.all(-1, keepdim=True)
    weights = logits.masked_fill(hidden & ~blind, float("-inf")).softmax(-1).masked_fill(hidden, 0.0)
    return weights @ value
