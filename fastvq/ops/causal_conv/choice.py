"""Which backend a masked convolution takes on a GPU: that of the shorter time, derived from its sizes.

The rates are those that an H200 showed; other GPUs differ by factors that the two have in common. See docs/numerics.md.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from fastvq._precision import product_precision
from fastvq.kernels.taps import read_taps
from fastvq.ops.grid import Form, Mask

# FLOP/s of matrix products of these sizes, and bytes/s of copies.
_PRODUCT = {"ieee": 47.7e12, "tf32": 298e12, "half": 634e12}
_COPY = 4.2e12
# Shares of the products' rate that convolutions reach: the library's, and ours in Triton.
_LIBRARY, _TRITON = 0.85, 0.45
_LAUNCH = 4e-6


class Times(NamedTuple):
    """Seconds of a forward pass, derived."""

    fused: float
    triton: float


def derived_times(x: Tensor, weight: Tensor, *, mask: Mask = "strict", form: Form = "rows") -> Times:
    """Of the convolution of activated x [B, C, H, W] with weight [O, C', k, k]."""
    kind = product_precision("convolution") if x.dtype == torch.float32 else "half"
    return _times(x.shape, weight.shape, kind, x.element_size(), mask, form)


@functools.lru_cache(maxsize=1024)
def _times(x: torch.Size, weight: torch.Size, kind: str, item: int, mask: Mask, form: Form) -> Times:
    batch, channels, height, width = x
    outputs, depth, kernel, _ = weight
    positions, taps = batch * height * width, read_taps(kernel, mask, form)
    product = 2 * positions * outputs * depth * taps.count / _PRODUCT[kind]
    # Both read x and write results. Between their kernels `fused` writes what the parts read and reads what they write.
    common = positions * (channels + outputs) * item
    parts = (taps.above > 0) + (taps.current > 0)
    between = parts * positions * (depth + outputs) * item
    return Times(
        product / _LIBRARY + (common + between) / _COPY + (2 + parts) * _LAUNCH,
        product / _TRITON + common / _COPY + _LAUNCH,
    )


def preferred(x: Tensor, weight: Tensor, *, mask: Mask = "strict", form: Form = "rows") -> tuple[str, str]:
    """Name of the backend and why."""
    if weight.shape[-1] == 1:
        return "fused", "one tap is a matrix product, the library's"
    times = derived_times(x, weight, mask=mask, form=form)
    name = "fused" if times.fused < times.triton else "triton"
    micro = [f"{1e6 * time:.3g} us" for time in times]
    return name, f"{micro[0]} derived for the library's convolution, {micro[1]} for Triton's"
