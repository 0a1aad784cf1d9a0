"""PyTorch's attention with a strict mask on a GPU, where moving rows takes as long as a fifth of it.

Position i + 1 gets the keys up to i, and position 0 gets zeros. One kernel puts the rows in their places, and another
one those of all three gradients, in the memory that channels-last features have; PyTorch takes four launches for the
former, two for every gradient, and leaves the result in an order that the next layer copies.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastvq.ops.causal_attention.once import Refusing


def shifted_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """[B, heads, N, D], in the memory of [B, N, heads, D]."""
    query, key, value = _Shift.apply(query, key, value)
    out: Tensor = _Behind.apply(F.scaled_dot_product_attention(query, key, value, is_causal=True))
    return out


class _Shift(torch.autograd.Function):
    """Queries but the first, and keys and values but the last."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        return query[:, :, 1:], key[:, :, :-1], value[:, :, :-1]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        if torch.is_grad_enabled():
            of_query, of_key, of_value = Refusing.apply(*grads)
            return F.pad(of_query, (0, 0, 1, 0)), F.pad(of_key, (0, 0, 0, 1)), F.pad(of_value, (0, 0, 0, 1))
        return _padded()(grads, (1, 0, 0))


class _Behind(torch.autograd.Function):
    """Rows behind one of zeros."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        out: Tensor = _padded()((x,), (1,))[0]
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0][:, :, 1:]


@functools.cache
def _padded() -> Callable[..., tuple[Tensor, ...]]:
    from fastvq.kernels.attention_shift import padded

    return padded
