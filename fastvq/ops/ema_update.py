"""The moving averages that move a codebook, updated in place by the statistics of a batch, in one pass."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastvq import _engine
from fastvq._check import INTEGER_DTYPES, require_dense, require_floating, require_tensor
from fastvq._memory import address
from fastvq.errors import ArgumentError, ArgumentTypeError, UnavailableError
from fastvq.ops.dispatch import ema_update_backends, is_batched, select_backend
from fastvq.ops.ema_update_reference import ema_update_reference

__all__ = ["cpp_ema_update", "ema_update", "ema_update_reference"]


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
        backend: None for the first that can run, ``"cpp"`` (float32 on a CPU, contiguous buffers) or ``"torch"``.

    Raises:
        ArgumentError: shapes or devices do not fit, a number is out of range, or a buffer takes part in gradients.
        ArgumentTypeError: something is no tensor, no number or of a type that does not fit.
        UnavailableError: the backend asked for cannot run here.

    van den Oord et al. 2017, appendix A.1.
    """
    _check(counts, sums, cluster_size, embedding_sum, embedding)
    if is_batched():
        raise UnavailableError("ema_update: vmap cannot batch what moves in place; codebooks may have an axis of heads")
    decay, eps = _number("decay", decay), _number("eps", eps)
    if not 0 <= decay <= 1:
        raise ArgumentError(f"decay: must lie in [0, 1], got {decay!r}")
    if not 0 < eps < math.inf:
        raise ArgumentError(f"eps: expected a positive number, got {eps!r}")
    if not isinstance(skip_unusable, bool):
        raise ArgumentTypeError(f"skip_unusable: expected a bool, got {type(skip_unusable).__name__} {skip_unusable!r}")
    torch.ops.fastvq.ema_update(
        counts, sums, cluster_size, embedding_sum, embedding, decay, eps, skip_unusable, backend
    )


def _number(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ArgumentTypeError(f"{name}: expected a number, got {type(value).__name__} {value!r}")
    return float(value)


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


def _ema_update(
    counts: Tensor,
    sums: Tensor,
    cluster_size: Tensor,
    embedding_sum: Tensor,
    embedding: Tensor,
    decay: float,
    eps: float,
    skip_unusable: bool,
    backend: str | None,
) -> None:
    buffers = cluster_size, embedding_sum, embedding
    chosen = select_backend("ema_update", ema_update_backends(counts, sums, *buffers), backend)
    if chosen == "torch":
        ema_update_reference(counts, sums, *buffers, decay, eps, skip_unusable)
        return
    cpp_ema_update(counts, sums, *buffers, decay, eps, skip_unusable)
    if not embedding.is_inference():
        # Written behind autograd's back: whoever has saved one of them for a backward pass must be told.
        torch.autograd.graph.increment_version(buffers)


def cpp_ema_update(
    counts: Tensor,
    sums: Tensor,
    cluster_size: Tensor,
    embedding_sum: Tensor,
    embedding: Tensor,
    decay: float,
    eps: float,
    skip_unusable: bool,
    *,
    threads: int | None = None,
) -> None:
    """`ema_update` in C++, with PyTorch's number of threads unless told otherwise."""
    whole = not counts.dtype.is_floating_point
    counts, sums = counts.to(torch.int64 if whole else torch.float32).contiguous(), sums.contiguous()
    heads = embedding.shape[0] if embedding.ndim == 3 else 1
    num_codes, depth = embedding.shape[-2:]
    places = [
        (address(name, value, dtype, heads * size), size * value.element_size())
        for name, value, dtype, size in (
            ("counts", counts, counts.dtype, num_codes),
            ("sums", sums, torch.float32, num_codes * depth),
            ("cluster_size", cluster_size, torch.float32, num_codes),
            ("embedding_sum", embedding_sum, torch.float32, num_codes * depth),
            ("embedding", embedding, torch.float32, num_codes * depth),
        )
    ]
    update = _engine.require().ema_update
    for head in range(heads):
        found, summed, *moved = (first + head * size for first, size in places)
        update(
            found,
            whole,
            summed,
            num_codes,
            depth,
            *moved,
            decay,
            eps,
            skip_unusable,
            torch.get_num_threads() if threads is None else threads,
        )


_library = torch.library.Library("fastvq", "FRAGMENT")
_library.define(
    "ema_update(Tensor counts, Tensor sums, Tensor(a!) cluster_size, Tensor(b!) embedding_sum, Tensor(c!) embedding,"
    " float decay, float eps, bool skip_unusable, str? backend) -> ()"
)
for _device in ("CPU", "CUDA"):
    _library.impl("ema_update", _ema_update, _device)


@torch.library.register_fake("fastvq::ema_update", lib=_library)
def _(*args: object) -> None:
    return None
