"""The moving averages of a codebook in C++."""

from __future__ import annotations

import torch
from torch import Tensor

from fastvq import _engine
from fastvq._memory import address
from fastvq.ops.dispatch import memory_reason
from fastvq.ops.ema_update import buffers
from fastvq.ops.ema_update.options import Options


def why_not(counts: Tensor, *floats: Tensor) -> str | None:
    for tensor in (counts, *floats):
        reason = memory_reason(tensor)
        if reason is not None:
            return reason
    return buffers.why_not(counts, *floats) or _engine.why_unavailable()


def cpp_ema_update(
    counts: Tensor,
    sums: Tensor,
    cluster_size: Tensor,
    embedding_sum: Tensor,
    embedding: Tensor,
    options: Options,
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
            options.decay,
            options.eps,
            options.skip_unusable,
            torch.get_num_threads() if threads is None else threads,
        )
    buffers.tell_autograd(cluster_size, embedding_sum, embedding)
