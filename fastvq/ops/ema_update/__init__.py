"""The moving averages that move a codebook, updated in place by the statistics of a batch, in one pass."""

from __future__ import annotations

import math

from torch import Tensor

from fastvq._check import (
    INTEGER_DTYPES,
    require_bool,
    require_dense,
    require_floating,
    require_number,
    require_real,
    require_tensor,
)
from fastvq._nvtx import annotate
from fastvq.errors import ArgumentError, UnavailableError
from fastvq.ops.dispatch import is_batched, runs_directly
from fastvq.ops.ema_update import backends
from fastvq.ops.ema_update.options import Options
from fastvq.ops.ema_update.reference import ema_update_reference

__all__ = ["ema_update", "ema_update_reference"]


@annotate("ema_update")
def ema_update(
    counts: Tensor,
    sums: Tensor,
    cluster_size: Tensor,
    embedding_sum: Tensor,
    embedding: Tensor,
    *,
    decay: float,
    eps: float = 1e-5,
    skip_unusable: bool = False,
    backend: str | None = None,
) -> None:
    """Move a codebook by the statistics of a batch.

    In place, with g for ``decay``: N_i = g N_i + (1 - g) n_i, m_i = g m_i + (1 - g) s_i, and, smoothed after Laplace so
    that a code hardly used does not divide by nothing, e_i = m_i / ((N_i + eps) / (N + K eps) N), N being the sum of
    all N_i. Where N is 0 the codes keep their place.

    Args:
        counts: n [K] or [H, K], how many vectors each code has got; integers, or floating point (a sum over processes).
        sums: s [K, D] or [H, K, D], the sum of these vectors; floating point. Both as `nearest_code_statistics` has
            them.
        cluster_size: N, like counts; floating point, moved in place.
        embedding_sum: m, like sums; floating point, moved in place.
        embedding: e, the codes, like sums; floating point, overwritten.
        decay: g, in [0, 1].
        eps: of the smoothing, positive.
        skip_unusable: leave a codebook as it is if one of its sums is not finite or no vector was counted.
        backend: None for the first that can run, ``"cpp"`` (CPU) and ``"triton"`` (GPU), which take float32 and
            contiguous buffers, or ``"torch"``.

    Raises:
        ArgumentError: shapes or devices do not fit, a number is out of range, or a buffer takes part in gradients.
        ArgumentTypeError: something is no tensor, no number or of a type that does not fit.
        UnavailableError: the backend asked for cannot run here.

    van den Oord et al. 2017, appendix A.1.
    """
    _check(counts, sums, cluster_size, embedding_sum, embedding)
    if is_batched():
        raise UnavailableError("ema_update: vmap cannot batch what moves in place; codebooks may have an axis of heads")
    decay, eps = require_number("decay", decay, least=0, most=1), require_real("eps", eps)
    if not 0 < eps < math.inf:
        raise ArgumentError(f"eps: expected a positive number, got {eps!r}")
    require_bool("skip_unusable", skip_unusable)
    given = counts, sums, cluster_size, embedding_sum, embedding
    backends.ema_update(*given, options=Options(decay, eps, skip_unusable, backend), direct=runs_directly(*given))


def _check(counts: object, sums: object, cluster_size: object, embedding_sum: object, embedding: object) -> None:
    embedding = require_tensor("embedding", embedding)
    require_floating("embedding", embedding)
    if embedding.ndim not in (2, 3):
        raise ArgumentError(f"embedding: expected shape [K, D] or [H, K, D], got {list(embedding.shape)}")
    moved = {"cluster_size": cluster_size, "embedding_sum": embedding_sum, "embedding": embedding}
    for name, value in {"counts": counts, "sums": sums, **moved}.items():
        tensor = require_tensor(name, value)
        if name == "counts" and tensor.dtype in INTEGER_DTYPES:
            require_dense(name, tensor)
        else:
            require_floating(name, tensor)
        shape = embedding.shape[:-1] if name in ("counts", "cluster_size") else embedding.shape
        if tensor.shape != shape:
            raise ArgumentError(f"{name}: expected shape {list(shape)} as embedding has it, got {list(tensor.shape)}")
        if tensor.device != embedding.device:
            raise ArgumentError(f"{name}: expected device {embedding.device} as for embedding, got {tensor.device}")
        if name in moved and tensor.requires_grad:
            raise ArgumentError(f"{name}: expected a tensor without gradient (use detach()), got requires_grad=True")
    if embedding is embedding_sum:
        raise ArgumentError("embedding_sum: expected another tensor than embedding")
