"""Causal attention over the positions of a grid in raster order."""

from __future__ import annotations

import torch
from torch import Tensor

from fastvq._check import (
    require_choice,
    require_dense,
    require_floating,
    require_like,
    require_real,
    require_seed,
    require_shape,
    require_tensor,
)
from fastvq._nvtx import annotate
from fastvq.errors import ArgumentError, UnavailableError
from fastvq.ops._registered import learns
from fastvq.ops.causal_attention import backends
from fastvq.ops.causal_attention.library import library_attention
from fastvq.ops.causal_attention.once import Once
from fastvq.ops.causal_attention.options import Options
from fastvq.ops.causal_attention.reference import causal_attention_reference
from fastvq.ops.causal_attention.shift import shifted_attention
from fastvq.ops.dispatch import in_forward_mode, is_differentiated, require_plain, runs_directly, why_no_triton
from fastvq.ops.grid import MASKS, Mask

__all__ = ["causal_attention", "causal_attention_reference"]


@annotate("causal_attention")
def causal_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    mask: Mask = "strict",
    dropout: float = 0.0,
    seed: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """Causal softmax attention over positions in raster order.

    Args:
        query, key: [B, heads, N, D], floating point.
        value: [B, heads, N, E], of the same dtype.
        mask: ``strict`` lets position i attend to positions before i, and position 0 gets zeros; ``inclusive`` lets it
            attend to itself too.
        dropout: probability in [0, 1) of setting a logit to 0 (Razavi et al. 2019, section 3.2); the others are scaled
            by 1 / (1 - dropout). 0 when not training.
        seed: of the dropout, in 0..2^63 - 1. The same seed drops the same logits for the same shape, device and
            backend. None draws a seed from PyTorch's default generator of the CPU.
        backend: None for the first that can run, ``"sdpa"`` (PyTorch's own, without dropout and with values as wide as
            keys: the first on a GPU), ``"triton"`` (GPU) or ``"torch"``; see `fastvq.ops.explain_backend`.

    Returns:
        [B, heads, N, E], of the inputs' dtype (that of autocast where it is on); logits are scaled by 1 / sqrt(D).

    Memory grows with N, not N^2. What a position gets does not depend on later positions as long as their entries are
    finite; a value of NaN may spoil earlier positions, with ``triton`` only gradients. The gradient has no gradient:
    differentiating twice raises, except through `causal_attention_reference`, which is also what forward mode takes
    and, where PyTorch's own attention does not serve, torch.func: with all N^2 logits, and without dropout.

    Raises:
        ArgumentError, ArgumentTypeError: shapes, dtypes, devices or numbers that do not fit.
        UnavailableError: the backend asked for cannot run here.
    """
    _check(query, key, value, mask, dropout, seed)
    direct = runs_directly(query, key, value)
    device = query.device.type
    if torch.is_autocast_enabled(device) and query.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    learning = learns(query, key, value)
    if not direct and in_forward_mode():
        return _plain_attention(query, key, value, mask, dropout, backend)
    if backends.runs_on_library(query, key, value, dropout, backend):
        if direct and learning:
            if query.is_cuda and mask == "strict" and why_no_triton() is None:
                return shifted_attention(query, key, value)
            query, key, value = Once.apply(query, key, value)
        return library_attention(query, key, value, mask)
    if not direct and is_differentiated():
        return _plain_attention(query, key, value, mask, dropout, backend)
    number = None
    if dropout:
        # A tensor, so that a compiled graph draws a seed of its own in every run.
        number = torch.randint(2**63 - 1, ()) if seed is None else torch.tensor(seed)
    options = Options(mask, float(dropout), backend)
    given = query, key, value, number
    out: Tensor = backends.causal_attention(*given, options=options, direct=direct, learns=learning)[0]
    return out


def _plain_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Mask, dropout: float, backend: str | None
) -> Tensor:
    """For transforms of torch.func and forward mode."""
    require_plain("causal_attention", backend)
    if dropout:
        raise UnavailableError(
            "dropout: expected 0 where transforms of torch.func or forward mode take derivatives, got "
            f"{dropout}; call eval() on the model"
        )
    return causal_attention_reference(query, key, value, mask=mask)


def _check(query: Tensor, key: Tensor, value: Tensor, mask: str, dropout: float, seed: int | None) -> None:
    require_choice("mask", mask, MASKS)
    require_floating("query", require_tensor("query", query))
    if query.ndim != 4:
        require_shape("query", query, ["B", "heads", "N", "D"])
    require_like("key", key, query.shape, query, "query")
    require_dense("value", require_tensor("value", value))
    if value.shape[:-1] != query.shape[:-1]:
        require_floating("value", value)
        require_shape("value", value, [*query.shape[:3], "E"])
    require_like("value", value, value.shape, query, "query")
    if not 0 <= require_real("dropout", dropout) < 1:
        raise ArgumentError(f"dropout: expected a probability in [0, 1), got {dropout}")
    if seed is not None:
        require_seed("seed", seed)
