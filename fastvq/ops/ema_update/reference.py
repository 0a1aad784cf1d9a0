"""The moving averages of a codebook in plain PyTorch: the definition, and what runs where no kernel does."""

from __future__ import annotations

import torch
from torch import Tensor


@torch.no_grad()
def ema_update_reference(
    counts: Tensor,
    sums: Tensor,
    cluster_size: Tensor,
    embedding_sum: Tensor,
    embedding: Tensor,
    decay: float,
    eps: float,
    skip_unusable: bool,
) -> None:
    """`fastvq.ops.ema_update` in plain PyTorch: the definition.

    Args:
        counts, sums: statistics of the batch, [..., K] and [..., K, D].
        cluster_size, embedding_sum, embedding: [..., K], [..., K, D] and [..., K, D], moved in place.
        decay, eps, skip_unusable: as of `fastvq.ops.ema_update`.
    """
    dtype = torch.promote_types(torch.promote_types(cluster_size.dtype, sums.dtype), torch.float32)
    before, counts, sums = cluster_size.to(dtype), counts.to(dtype), sums.to(dtype)
    size = decay * before + (1 - decay) * counts
    total = decay * embedding_sum.to(dtype) + (1 - decay) * sums
    whole = size.sum(-1, keepdim=True)
    codes = total / ((size + eps) / (whole + size.shape[-1] * eps) * whole)[..., None]
    codes = torch.where(whole[..., None] > 0, codes, embedding.to(dtype))
    if skip_unusable:
        usable = sums.isfinite().flatten(-2).all(-1) & (counts.sum(-1) > 0)
        size = torch.where(usable[..., None], size, before)
        total = torch.where(usable[..., None, None], total, embedding_sum.to(dtype))
        codes = torch.where(usable[..., None, None], codes, embedding.to(dtype))
    cluster_size.copy_(size)
    embedding_sum.copy_(total)
    embedding.copy_(codes)
