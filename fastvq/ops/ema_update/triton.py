"""The moving averages of a codebook by the project's Triton kernel, which is imported with the first call."""

from __future__ import annotations

from torch import Tensor

from fastvq.ops.dispatch import triton_reason
from fastvq.ops.ema_update import buffers
from fastvq.ops.ema_update.options import Options


def why_not(counts: Tensor, *floats: Tensor) -> str | None:
    return triton_reason(counts, *floats) or buffers.why_not(counts, *floats)


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
    buffers.tell_autograd(*moved)
