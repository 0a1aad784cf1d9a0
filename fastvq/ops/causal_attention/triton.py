"""Causal attention by the project's Triton kernels, which are imported with the first call."""

from __future__ import annotations

import torch
from torch import Tensor

from fastvq._precision import product_precision
from fastvq.ops.causal_attention.options import Gradients, Options
from fastvq.ops.dispatch import sm100_reason, triton_reason

# Blocks of the kernels hold whole rows; wider ones of float32 do not fit into registers.
_WIDEST_HEAD = 256
_WIDEST_FLOAT32_HEAD = 128


def why_not(query: Tensor, key: Tensor, value: Tensor) -> str | None:
    widest = max(query.shape[-1], value.shape[-1])
    limit, of_type = (_WIDEST_FLOAT32_HEAD, " of float32") if query.dtype == torch.float32 else (_WIDEST_HEAD, "")
    too_wide = f"it takes widths{of_type} up to {limit}, not {widest}" if widest > limit else None
    return triton_reason(query, key, value) or sm100_reason(query) or too_wide


def forward(query: Tensor, key: Tensor, value: Tensor, seed: Tensor | None, options: Options) -> tuple[Tensor, Tensor]:
    """Output [B, heads, N, E] and the logarithm of each position's sum of exponentials, [B, heads, N]."""
    from fastvq.kernels import causal_attention as kernels

    return kernels.forward(query, key, value, **_how(seed, options))


def backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    seed: Tensor | None,
    options: Options,
) -> Gradients:
    """Gradients of query, key and value."""
    from fastvq.kernels import causal_attention as kernels

    return kernels.backward(grad, query, key, value, out, lse, **_how(seed, options))


def _how(seed: Tensor | None, options: Options) -> dict[str, str | float]:
    number, precision = 0 if seed is None else int(seed), product_precision("attention")
    return {"mask": options.mask, "dropout": options.dropout, "seed": number, "precision": precision}
