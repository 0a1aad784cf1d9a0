"""All levels of a residual quantiser by the project's Triton kernels, which are imported with the first call."""

from __future__ import annotations

from torch import Tensor

from fastvq.ops.dispatch import sm100_reason, triton_reason
from fastvq.ops.residual_codes.options import Codes, Options, Statistics, StatisticsOptions

_WIDEST_VECTOR = 256


def why_not(x: Tensor, codebooks: Tensor) -> str | None:
    width = x.shape[-1]
    fits = 0 < width <= _WIDEST_VECTOR
    reason = None if fits else f"it takes vectors of 1 to {_WIDEST_VECTOR} elements, not {width}"
    return triton_reason(x, codebooks) or sm100_reason(x) or reason


def codes(x: Tensor, codebooks: Tensor, depths: Tensor | None, options: Options) -> Codes:
    from fastvq.kernels import residual_codes as kernels

    return kernels.residual_codes(x, codebooks, depths, mode=options.mode)


def statistics(x: Tensor, codebooks: Tensor, depths: Tensor | None, options: StatisticsOptions) -> Statistics:
    from fastvq.kernels import residual_codes as kernels

    mode, deterministic = options.mode, options.deterministic
    return kernels.residual_codes_statistics(x, codebooks, depths, mode=mode, deterministic=deterministic)
