"""A codebook made ready for the tensor cores: centred on its mean, scaled by a power of two, rounded to float16."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["FUSE", "UNUSABLE", "ScaledCodes", "power_of_two", "scale_codes", "scale_exponent"]

# Magnitudes that scaling aims at: below the largest float16 (65504) after rounding up, far above its least (6e-8).
_TOP: tl.constexpr = tl.constexpr(14)
# Scaled half norm of a code that must not be chosen: beyond every score of a usable code, about 2^101 at most.
UNUSABLE: tl.constexpr = tl.constexpr(2.0**120)
# Codes beyond this have no finite half norm in float32.
_LARGEST: tl.constexpr = tl.constexpr(2.0**62)
# Codes per partial sum, and per program that prepares them.
_SUM_ROWS = 512
_BLOCK_R = 16
# Stated, because Triton's default is about to change: a score is one fused operation less.
FUSE = {"enable_fp_fusion": True}


class ScaledCodes(NamedTuple):
    """A codebook as `scale_codes` leaves it. K' and D' are K and D rounded up to whole blocks, filled with zeros.

    Attributes:
        mean: float32 [H, D'], of the usable codes: those that are finite and below 2^62.
        exponents: int32 [H]; centred codes are scaled by 2^exponent, their half norms by its square.
        bounds: float32 [H, 2], the largest norm of a scaled code and of a residual of its rounding.
        halves: float32 [H, K'], half the squared norm of each scaled code; 2^120 where the code is not usable.
        codes16: float16 [H, K', D'], scaled and rounded.
        codes32: float32 [H, K', D'], scaled; empty unless asked for.
    """

    mean: Tensor
    exponents: Tensor
    bounds: Tensor
    halves: Tensor
    codes16: Tensor
    codes32: Tensor


@triton.jit
def power_of_two(exponent):
    """2^exponent for -126 <= exponent <= 127, exactly."""
    return ((exponent + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def scale_exponent(largest):
    """Exponent that brings ``largest`` >= 0 into [2^_TOP, 2^(_TOP + 1)); less for what is below 2^-100."""
    return _TOP - tl.maximum((largest.to(tl.int32, bitcast=True) >> 23) - 127, -100)


@triton.jit
def _usable(codes, inside):
    """Which rows of codes [R, D] have finite half norms, as int32 [R]."""
    bad = (tl.abs(codes) < _LARGEST) == 0
    return tl.where(inside & (tl.max(bad.to(tl.int32), axis=1) == 0), 1, 0)


@triton.jit
def _codebook_sums_kernel(
    codebook, stride_h, stride_k, sums, counts, largest, num_codes, width,
    SUM_ROWS: tl.constexpr, BLOCK_R: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Sum, number and largest magnitude of the usable codes in each run of SUM_ROWS codes."""
    part = tl.program_id(0)
    slot = tl.program_id(1).to(tl.int64) * tl.num_programs(0) + part
    codebook += tl.program_id(1).to(tl.int64) * stride_h
    cols = tl.arange(0, WIDTH)
    total = tl.zeros([WIDTH], tl.float32)
    number = tl.zeros([BLOCK_R], tl.int32)
    top = tl.zeros([BLOCK_R], tl.float32)
    for first in range(0, SUM_ROWS, BLOCK_R):
        rows = part * SUM_ROWS + first + tl.arange(0, BLOCK_R)
        inside = (rows < num_codes)[:, None] & (cols < width)[None, :]
        codes = tl.load(codebook + rows.to(tl.int64)[:, None] * stride_k + cols[None, :], mask=inside, other=0.0)
        codes = codes.to(tl.float32)
        usable = _usable(codes, rows < num_codes)
        codes = tl.where(usable[:, None] > 0, codes, 0.0)  # [BLOCK_R, WIDTH]
        total += tl.sum(codes, axis=0)
        number += usable
        top = tl.maximum(top, tl.max(tl.abs(codes), axis=1))
    tl.store(sums + slot * WIDTH + cols, total)
    tl.store(counts + slot, tl.sum(number, axis=0))
    tl.store(largest + slot, tl.max(top, axis=0))


@triton.jit
def _prepare_kernel(
    codebook, stride_h, stride_k, sums, counts, largest, parts, num_codes, width, padded,
    mean, exponents, bounds, halves, codes16, codes32,
    BLOCK_R: tl.constexpr, WIDTH: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Centres, scales and rounds the codes; the largest |c| and |cl| go to ``bounds`` [H, 2]."""
    head = tl.program_id(1).to(tl.int64)
    cols = tl.arange(0, WIDTH)
    total = tl.zeros([WIDTH], tl.float32)
    number = 0
    top = 0.0
    for part in range(parts):
        slot = head * parts + part
        total += tl.load(sums + slot * WIDTH + cols)
        number += tl.load(counts + slot)
        top = tl.maximum(top, tl.load(largest + slot))
    centre = total / tl.maximum(number, 1).to(tl.float32)
    # Centred codes are at most twice as large as the largest code.
    exponent = scale_exponent(2 * top)
    if tl.program_id(0) == 0:
        tl.store(mean + head * padded + cols, centre, mask=cols < padded)
        tl.store(exponents + head, exponent)

    rows = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    inside = (rows < num_codes)[:, None] & (cols < width)[None, :]
    codes = tl.load(
        codebook + head * stride_h + rows.to(tl.int64)[:, None] * stride_k + cols[None, :], mask=inside, other=0.0
    ).to(tl.float32)
    usable = _usable(codes, rows < num_codes) > 0
    codes = tl.where(usable[:, None] & inside, (codes - centre[None, :]) * power_of_two(exponent), 0.0)
    rounded = codes.to(tl.float16)
    residual = codes - rounded.to(tl.float32)
    squares = tl.sum(codes * codes, axis=1)
    slots = head * tl.num_programs(0) * BLOCK_R + rows
    tl.store(halves + slots, tl.where(usable, squares / 2, UNUSABLE))
    places = slots[:, None] * padded + cols[None, :]
    fits = (cols < padded)[None, :] & (rows >= 0)[:, None]
    tl.store(codes16 + places, rounded, mask=fits)
    if EXACT:
        tl.store(codes32 + places, codes, mask=fits)
        tl.atomic_max(bounds + head * 2 + 1, tl.sqrt(tl.max(tl.sum(residual * residual, axis=1), axis=0)))
    tl.atomic_max(bounds + head * 2, tl.sqrt(tl.max(squares, axis=0)))


def scale_codes(codebook: Tensor, padded_codes: int, padded_width: int, exact: bool) -> ScaledCodes:
    """Prepares a codebook [H, K, D] whose last axis has stride 1; ``exact`` also fills codes32 and residuals."""
    heads, num_codes, width = codebook.shape
    parts = triton.cdiv(num_codes, _SUM_ROWS)
    wide = triton.next_power_of_2(padded_width)

    def floats(*shape: int) -> Tensor:
        return codebook.new_empty(shape, dtype=torch.float32)

    sums, largest = floats(heads, parts, wide), floats(heads, parts)
    numbers = codebook.new_empty((heads, parts), dtype=torch.int32)
    _codebook_sums_kernel[(parts, heads)](
        codebook, codebook.stride(0), codebook.stride(1), sums, numbers, largest, num_codes, width,
        SUM_ROWS=_SUM_ROWS, BLOCK_R=_BLOCK_R, WIDTH=wide, num_warps=4, **FUSE,
    )  # fmt: skip
    codes = ScaledCodes(
        mean=floats(heads, padded_width),
        exponents=codebook.new_empty(heads, dtype=torch.int32),
        bounds=codebook.new_zeros((heads, 2), dtype=torch.float32),
        halves=floats(heads, padded_codes),
        codes16=codebook.new_empty((heads, padded_codes, padded_width), dtype=torch.float16),
        codes32=floats(heads, padded_codes if exact else 0, padded_width),
    )
    _prepare_kernel[(padded_codes // _BLOCK_R, heads)](
        codebook, codebook.stride(0), codebook.stride(1), sums, numbers, largest, parts, num_codes, width, padded_width,
        *codes, BLOCK_R=_BLOCK_R, WIDTH=wide, EXACT=exact, num_warps=4, **FUSE,
    )  # fmt: skip
    return codes
