"""The moving averages of a codebook by the project's Triton kernel, which is imported with the first call."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fastvq.ops.dispatch import triton_reason
from fastvq.ops.ema_update import buffers as checks
from fastvq.ops.ema_update.buffers import tell_autograd
from fastvq.ops.ema_update.options import Options


def why_not(counts: Tensor, *floats: Tensor) -> str | None:
    return triton_reason(counts, *floats) or checks.why_not(counts, *floats)


def triton_ema_update(
    counts: Tensor, sums: Tensor, cluster_size: Tensor, embedding_sum: Tensor, embedding: Tensor, options: Options
) -> None:
    from fastvq.kernels import ema

    moved = cluster_size, embedding_sum, embedding
    ema.ema_update(
        counts.contiguous(),
        sums.contiguous(),
        *moved,
        decay=options.decay,
        eps=options.eps,
        skip_unusable=options.skip_unusable,
    )
    tell_autograd(*moved)


def triton_ema_updates(counts: Tensor, sums: Tensor, buffers: Sequence[Sequence[Tensor]], options: Options) -> None:
    """The same for H codebooks: counts [H, K], sums [H, K, D], H times cluster_size, embedding_sum and embedding."""
    from fastvq.kernels import ema

    decay, eps, skip_unusable, _ = options
    ema.ema_updates(counts.contiguous(), sums.contiguous(), buffers, decay=decay, eps=eps, skip_unusable=skip_unusable)
    tell_autograd(*(one for several in buffers for one in several))
