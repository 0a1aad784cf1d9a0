"""The backends of nearest code, for x [H, N, D] and codebook [H, K, D] that the public functions have checked."""

from __future__ import annotations

import torch
from torch import Tensor

from fastvq.errors import ArgumentError
from fastvq.ops.dispatch import nearest_code_backends, select_backend
from fastvq.ops.nearest_code_reference import indices_reference, statistics_reference, wide_dtype

__all__ = ["nearest_code", "nearest_code_statistics", "wide_dtype"]

Statistics = tuple[Tensor, Tensor, Tensor, Tensor]


def nearest_code(x: Tensor, codebook: Tensor, mode: str, check_finite: bool, backend: str | None) -> Tensor:
    """Indices [H, N]."""
    chosen = select_backend("nearest_code", nearest_code_backends(x, codebook), backend)
    if check_finite:
        _require_finite(x, None)
    if chosen == "triton":
        from fastvq.kernels import nearest_code as kernels

        return kernels.nearest_code(x, codebook, mode=mode)
    return indices_reference(x, codebook).clamp(min=0)


def nearest_code_statistics(
    x: Tensor,
    codebook: Tensor,
    mask: Tensor | None,
    mode: str,
    deterministic: bool,
    check_finite: bool,
    backend: str | None,
) -> Statistics:
    """Squared error [H], sums [H, K, D], counts [H, K], indices [H, N]."""
    chosen = select_backend("nearest_code", nearest_code_backends(x, codebook), backend)
    if check_finite:
        _require_finite(x, mask)
    if chosen == "triton":
        from fastvq.kernels import nearest_code as kernels

        return kernels.nearest_code_statistics(x, codebook, mask, mode=mode, deterministic=deterministic)
    found = indices_reference(x, codebook)
    assigned = found if mask is None else torch.where(mask, found, -1)
    return *statistics_reference(x, codebook, assigned, mask), found.clamp(min=0)


def _require_finite(x: Tensor, mask: Tensor | None) -> None:
    bad = ~x.isfinite().all(-1)
    if mask is not None:
        bad &= mask
    if bad.any():
        head, row = (int(i) for i in bad.nonzero()[0])
        where = f"[{head}, {row}]" if x.shape[0] > 1 else f"[{row}]"
        raise ArgumentError(
            f"x: expected finite values, got NaN or infinity in {int(bad.sum())} of {bad.numel()} vectors,"
            f" the first at {where}"
        )
