"""Causal attention by PyTorch's own operator: fast and of little memory, without dropout."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def why_not(query: Tensor, key: Tensor, value: Tensor) -> str | None:
    """Why PyTorch's operator does not serve, or None."""
    length, width, value_width = query.shape[2], query.shape[3], value.shape[3]
    if length < 2:
        return f"it takes two positions or more, not {length}"
    if width != value_width:
        return f"it takes values as wide as keys, not {value_width} and {width}"
    if query.is_cuda and query.dtype == torch.float64:
        return "it would hold all logits of float64"
    return None


def refuses(dropout: float = 0.0, lse: bool = False) -> str | None:
    """Why not with these options; ``lse`` asks for the logarithms of sums too, as registered operations keep them."""
    if dropout:
        return "it drops weights, not logits"
    return "it keeps the logarithms of sums to itself" if lse else None


def library_attention(query: Tensor, key: Tensor, value: Tensor, mask: str) -> Tensor:
    """PyTorch's operator."""
    if mask == "inclusive":
        return F.scaled_dot_product_attention(query, key, value, is_causal=True)
    differentiated = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (query, key, value))
    if query.is_cpu and query.shape[2] % 16 == 0 and not differentiated:
        # Queries shifted instead, so that the length stays a multiple of a vector: one less takes up to twice as long.
        # The last key, which no position reads, would reach gradients through the query that is thrown away.
        following = F.pad(query[:, :, 1:], (0, 0, 0, 1))
        return F.pad(F.scaled_dot_product_attention(following, key, value, is_causal=True)[:, :, :-1], (0, 0, 1, 0))
    # Shifting keys by one turns the strict mask into the inclusive one, without a fully masked row.
    shifted = query[:, :, 1:], key[:, :, :-1], value[:, :, :-1]
    return F.pad(F.scaled_dot_product_attention(*shifted, is_causal=True), (0, 0, 1, 0))
