"""A kernel that stores what the elementary functions of the Triton kernels give."""

from __future__ import annotations

import triton
import triton.language as tl

from fastvq.kernels.elementary import elu_pair, exp_negative, expm1_negative, sigmoids

FUNCTIONS = ("exp", "expm1", "sigmoid", "sigmoid-of-minus", "elu", "elu-of-minus")


@triton.jit
def every_function(x_ptr, out_ptr, size, BLOCK: tl.constexpr):
    """out [FUNCTIONS, size]: exp and expm1 of -|x|, the others of x."""
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    mask = offs < size  # [BLOCK]
    x = tl.load(x_ptr + offs, mask=mask, other=0.0)  # [BLOCK]
    above, below = sigmoids(x)  # [BLOCK] each
    positive, negative = elu_pair(x, True)  # [BLOCK] each
    tl.store(out_ptr + offs, exp_negative(-tl.abs(x), True), mask=mask)
    tl.store(out_ptr + size + offs, expm1_negative(-tl.abs(x), True), mask=mask)
    tl.store(out_ptr + size * 2 + offs, above, mask=mask)
    tl.store(out_ptr + size * 3 + offs, below, mask=mask)
    tl.store(out_ptr + size * 4 + offs, positive, mask=mask)
    tl.store(out_ptr + size * 5 + offs, negative, mask=mask)
