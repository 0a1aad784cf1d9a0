"""Which backend a masked convolution takes on a GPU: that of the shorter time, derived from its sizes.

The rates are those that an H200 showed; other GPUs differ by factors that the two have in common. See docs/numerics.md.
"""

from __future__ import annotations

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
    batch, channels, height, width = x.shape
    outputs, depth, kernel, _ = weight.shape
    positions, taps = batch * height * width, read_taps(kernel, mask, form)
    kind = product_precision("convolution") if x.dtype == torch.float32 else "half"
    product = 2 * positions * outputs * depth * taps.count / _PRODUCT[kind]
    item = x.element_size()
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
    times = derived_times(x, weight, mask=mask, form=form)
    name = "fused" if times.fused < times.triton else "triton"
    micro = [f"{1e6 * time:.3g} us" for time in times]
    return name, f"{micro[0]} derived for the library's convolution, {micro[1]} for Triton's"
