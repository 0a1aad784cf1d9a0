"""Numbers of float32 as bfloat16 planes, each what those before it leave of a number, for products on tensor cores."""

from __future__ import annotations

import triton
import triton.language as tl

# The largest finite number of bfloat16.
_LARGEST: tl.constexpr = tl.constexpr(3.3895313892515355e38)


@triton.jit
def store_planes(ptrs, plane, value, mask, PLANES: tl.constexpr):
    """Stores a block of float32 numbers in places ``plane`` numbers apart.

    Three planes have all bits of a number, and infinity in the last one; one is the number rounded.
    """
    for index in tl.static_range(PLANES):
        part = value
        if index < PLANES - 1:
            part = tl.clamp(value, -_LARGEST, _LARGEST, propagate_nan=tl.PropagateNan.ALL)
        part = part.to(tl.bfloat16)
        tl.store(ptrs + index * plane.to(tl.int64), part, mask=mask)
        value -= part.to(tl.float32)


@triton.jit
def _planes_kernel(
    step_ptr, kept_ptr, features_ptr, places_ptr, plane,
    UNIT: tl.constexpr, PLANES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Planes of the row before ``step`` of sample 1 of the grid and place 2: what steps have left in float32."""
    row = tl.load(step_ptr) - 1
    place = places_ptr + tl.program_id(2) * 8
    if row >= 0:
        first = tl.load(place) + row % tl.load(place + 1) * tl.load(place + 2)
        first = (first + tl.program_id(1) * tl.load(place + 3)) * UNIT
        offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
        mask = offs < tl.load(place + 4) * UNIT  # [BLOCK]
        value = tl.load(kept_ptr + first + offs, mask=mask, other=0.0)  # [BLOCK]
        store_planes(features_ptr + first + offs, plane, value, mask, PLANES)
