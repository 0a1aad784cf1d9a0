"""Nearest code by the project's Triton kernels, which are imported with the first call."""

from __future__ import annotations

from torch import Tensor

from fastvq.ops.dispatch import triton_reason
from fastvq.ops.nearest_code.options import Options, Statistics, StatisticsOptions

_WIDEST_VECTOR = 512


def why_not(x: Tensor, codebook: Tensor) -> str | None:
    width = x.shape[-1]
    wide = f"it takes vectors of up to {_WIDEST_VECTOR} elements, not {width}" if width > _WIDEST_VECTOR else None
    return triton_reason(x, codebook) or wide


def indices(x: Tensor, codebook: Tensor, options: Options) -> Tensor:
    from fastvq.kernels import nearest_code as kernels

    return kernels.nearest_code(x, codebook, mode=options.mode)


def statistics(x: Tensor, codebook: Tensor, mask: Tensor | None, options: StatisticsOptions) -> Statistics:
    from fastvq.kernels import nearest_code as kernels

    mode, deterministic = options.mode, options.deterministic
    return kernels.nearest_code_statistics(x, codebook, mask, mode=mode, deterministic=deterministic)
