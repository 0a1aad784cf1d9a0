"""A codebook made ready for the tensor cores: centred, scaled by a power of two, rounded to float16.

No single code may decide how the others are centred and scaled. Lengths are told apart by their exponents, which are
counted in tables of `_BINS` bins:

- The centre is the mean of the short codes: those whose exponent is at most one above that of the second shortest. A
  code far away has no part in it, and data far from the origin keep theirs, whose codes are all about as long.
- Codes beyond reach are those 8 times as long, once centred, as nearly all vectors (a sample of them) and as the
  shortest code. They are left out of the scale, of the bounds and of the search over float16. Such a code c can be
  nearest to x only if |c| <= |x| + the distance found, so a vector with |x| well below |c| does not have to know it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["BEYOND", "FUSE", "NOTHING", "UNUSABLE", "ScaledCodes", "power_of_two", "scale_codes", "scale_exponent"]

# Magnitudes that scaling aims at: below the largest float16 (65504) after rounding up, far above its least (6e-8).
_TOP: tl.constexpr = tl.constexpr(14)
# Scaled half norm of a code that must not be chosen, and of one beyond reach: greater than every score of a code that
# takes part in the search, about 2^101 at most.
UNUSABLE: tl.constexpr = tl.constexpr(2.0**120)
BEYOND: tl.constexpr = tl.constexpr(2.0**119)
# Exponent of the shortest code beyond reach where there is none.
NOTHING: tl.constexpr = tl.constexpr(1000)
# Codes beyond this have no finite half norm in float32.
_LARGEST: tl.constexpr = tl.constexpr(2.0**62)
# Of exponents of lengths, the first being that of 2^-127.
_BINS: tl.constexpr = tl.constexpr(256)
_ZERO_BIN: tl.constexpr = tl.constexpr(127)
# Twice as long as the ends of their bins, and 8 times.
_REACH: tl.constexpr = tl.constexpr(4)
# Codes per partial sum.
_SUM_ROWS = 512
# Stated, because Triton's default is about to change: a score is one fused operation less.
FUSE = {"enable_fp_fusion": True}


class ScaledCodes(NamedTuple):
    """A codebook as `scale_codes` leaves it. K' and D' are K and D rounded up to whole blocks, filled with zeros.

    Attributes:
        mean: float32 [H, D'], of the short codes, which everything is centred on.
        exponents: int32 [H, 2]; codes within reach are scaled by 2^first, their half norms by its square; codes beyond
            reach are at least 2^second long, unscaled (`NOTHING` if there are none).
        bounds: float32 [H, 2], the largest norm of a scaled code and of a residual of its rounding, within reach.
        halves: float32 [H, K'], half the squared norm of each scaled code; 2^120 where the code is not usable (not
            finite, or 2^62 and more), 2^119 where it is beyond reach.
        codes16: float16 [H, K', D'], scaled and rounded; zeros beyond reach.
        codes32: float32 [H, K', D'], not scaled.
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
def _load_codes(codebook, stride_k, rows, num_codes, width, cols):
    """Codes of rows [R] as float32 [R, D], zeros where they are not usable, and which are, as bool [R]."""
    inside = (rows < num_codes)[:, None] & (cols < width)[None, :]
    codes = tl.load(codebook + rows.to(tl.int64)[:, None] * stride_k + cols[None, :], mask=inside, other=0.0)
    codes = codes.to(tl.float32)
    bad = (tl.abs(codes) < _LARGEST) == 0
    usable = (rows < num_codes) & (tl.max(bad.to(tl.int32), axis=1) == 0)
    return tl.where(usable[:, None], codes, 0.0), usable


@triton.jit
def _length_bins(values):
    """Exponent of the length of each row of values [R, D], as a number of a bin; -1 where it is not finite."""
    top = tl.max(tl.abs(values), axis=1)
    exponent = tl.minimum(tl.maximum((top.to(tl.int32, bitcast=True) >> 23) - 127, -100), 126)
    scaled = values * power_of_two(-exponent)[:, None]
    squares = tl.sum(scaled * scaled, axis=1)
    # Shifted down rather than divided, which is the floor of half a negative exponent too.
    length = exponent + (((squares.to(tl.int32, bitcast=True) >> 23) - 127) >> 1)
    return tl.where(squares < float("inf"), tl.maximum(length + _ZERO_BIN, 0), -1)


@triton.jit
def _count(table, bins):
    """Adds bins [R] to a table; -1 is none of them."""
    places = tl.arange(0, _BINS)
    counts = tl.sum((bins[:, None] == places[None, :]).to(tl.int32), axis=0)
    tl.atomic_add(table + places, counts, mask=counts > 0)


@triton.jit
def _lengths_kernel(
    codebook, stride_h, stride_k, tables, num_codes, width, BLOCK_R: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Counts the lengths of codes in the head's first table."""
    head = tl.program_id(1).to(tl.int64)
    rows = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    cols = tl.arange(0, WIDTH)
    codes, usable = _load_codes(codebook + head * stride_h, stride_k, rows, num_codes, width, cols)
    _count(tables + head * 3 * _BINS, tl.where(usable, _length_bins(codes), -1))


@triton.jit
def _short_sums_kernel(
    codebook, stride_h, stride_k, tables, sums, counts, num_codes, width,
    SUM_ROWS: tl.constexpr, BLOCK_R: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Sum and number of the short codes in each run of SUM_ROWS codes."""
    part = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    slot = head * tl.num_programs(0) + part
    running = tl.cumsum(tl.load(tables + head * 3 * _BINS + tl.arange(0, _BINS)), axis=0)
    second = tl.sum((running < tl.minimum(tl.max(running, axis=0), 2)).to(tl.int32), axis=0)
    cols = tl.arange(0, WIDTH)
    total = tl.zeros([WIDTH], tl.float32)
    number = tl.zeros([BLOCK_R], tl.int32)
    for first in range(0, SUM_ROWS, BLOCK_R):
        rows = part * SUM_ROWS + first + tl.arange(0, BLOCK_R)
        codes, usable = _load_codes(codebook + head * stride_h, stride_k, rows, num_codes, width, cols)
        short = usable & (_length_bins(codes) <= second + 1)
        total += tl.sum(tl.where(short[:, None], codes, 0.0), axis=0)
        number += short.to(tl.int32)
    tl.store(sums + slot * WIDTH + cols, total)
    tl.store(counts + slot, tl.sum(number, axis=0))


@triton.jit
def _centre_kernel(
    codebook, stride_h, stride_k, x, stride_xh, stride_xn, sums, counts, parts, num_codes, num_rows, width, padded,
    mean, tables, bins,
    BLOCK_R: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """The centre; the bin of each code's length from there, -1 if it is not usable; tables of these and of vectors'."""
    head = tl.program_id(1).to(tl.int64)
    cols = tl.arange(0, WIDTH)
    total = tl.zeros([WIDTH], tl.float32)
    number = 0
    for part in range(parts):
        slot = head * parts + part
        total += tl.load(sums + slot * WIDTH + cols)
        number += tl.load(counts + slot)
    centre = total / tl.maximum(number, 1).to(tl.float32)
    if tl.program_id(0) == 0:
        tl.store(mean + head * padded + cols, centre, mask=cols < padded)

    rows = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    codes, usable = _load_codes(codebook + head * stride_h, stride_k, rows, num_codes, width, cols)
    found = tl.where(usable, _length_bins(codes - centre[None, :]), -1)
    tl.store(bins + head * tl.num_programs(0) * BLOCK_R + rows, found)
    _count(tables + (head * 3 + 1) * _BINS, found)
    # As many vectors as codes, from everywhere.
    sample = rows.to(tl.int64) * num_rows // (tl.num_programs(0) * BLOCK_R)
    vectors = tl.load(
        x + head * stride_xh + sample[:, None] * stride_xn + cols[None, :], mask=(cols < width)[None, :], other=0.0
    ).to(tl.float32)
    _count(tables + (head * 3 + 2) * _BINS, _length_bins(vectors - centre[None, :]))


@triton.jit
def _prepare_kernel(
    codebook, stride_h, stride_k, tables, bins, mean, num_codes, width, padded,
    exponents, bounds, halves, codes16, codes32,
    BLOCK_R: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Centres, scales and rounds the codes; the largest |c| and |cl| within reach go to ``bounds`` [H, 2]."""
    head = tl.program_id(1).to(tl.int64)
    places = tl.arange(0, _BINS)
    present = tl.load(tables + (head * 3 + 1) * _BINS + places) > 0
    running = tl.cumsum(tl.load(tables + (head * 3 + 2) * _BINS + places), axis=0)
    # Reached by 15 of 16 vectors.
    typical = tl.sum((16 * running < 15 * tl.max(running, axis=0)).to(tl.int32), axis=0)
    shortest = tl.min(tl.where(present, places, _BINS), axis=0)
    reach = tl.maximum(typical, shortest) + _REACH
    longest = tl.max(tl.where(present & (places < reach), places, 0), axis=0)
    beyond = tl.min(tl.where(present & (places >= reach), places - _ZERO_BIN, NOTHING), axis=0)
    exponent = _TOP - tl.maximum(longest - _ZERO_BIN, -100)
    if tl.program_id(0) == 0:
        tl.store(exponents + head * 2, exponent)
        tl.store(exponents + head * 2 + 1, beyond)

    cols = tl.arange(0, WIDTH)
    rows = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    slots = head * tl.num_programs(0) * BLOCK_R + rows
    codes, usable = _load_codes(codebook + head * stride_h, stride_k, rows, num_codes, width, cols)
    centre = tl.load(mean + head * padded + cols, mask=cols < width, other=0.0)
    codes = tl.where(usable[:, None], codes - centre[None, :], 0.0)
    near = usable & (tl.load(bins + slots) < reach)
    scaled = tl.where(near[:, None], codes * power_of_two(exponent), 0.0)
    rounded = scaled.to(tl.float16)
    residual = scaled - rounded.to(tl.float32)
    squares = tl.sum(scaled * scaled, axis=1)
    tl.store(halves + slots, tl.where(near, squares / 2, tl.where(usable, BEYOND, UNUSABLE)))
    spots = slots[:, None] * padded + cols[None, :]
    fits = (cols < padded)[None, :] & (rows >= 0)[:, None]
    tl.store(codes16 + spots, rounded, mask=fits)
    tl.store(codes32 + spots, codes, mask=fits)
    tl.atomic_max(bounds + head * 2, tl.sqrt(tl.max(squares, axis=0)))
    tl.atomic_max(bounds + head * 2 + 1, tl.sqrt(tl.max(tl.sum(residual * residual, axis=1), axis=0)))


def scale_codes(codebook: Tensor, x: Tensor, padded_codes: int, padded_width: int) -> ScaledCodes:
    """Prepares a codebook [H, K, D] for vectors x [H, N, D], both with a last axis of stride 1."""
    heads, num_codes, width = codebook.shape
    parts = triton.cdiv(num_codes, _SUM_ROWS)
    wide = triton.next_power_of_2(padded_width)
    # What registers have room for, and a divisor of padded_codes.
    block_r = min(32 if wide <= 128 else 16, padded_codes & -padded_codes)

    def floats(*shape: int) -> Tensor:
        return codebook.new_empty(shape, dtype=torch.float32)

    def whole(*shape: int) -> Tensor:
        return codebook.new_empty(shape, dtype=torch.int32)

    table_size = heads * 3 * _BINS.value
    zeros = codebook.new_zeros(table_size + heads * 2, dtype=torch.int32)
    tables, sums, counts = zeros[:table_size], floats(heads, parts, wide), whole(heads, parts)
    bins = whole(heads, padded_codes)
    codes = ScaledCodes(
        mean=floats(heads, padded_width),
        exponents=whole(heads, 2),
        bounds=zeros[table_size:].view(torch.float32).view(heads, 2),
        halves=floats(heads, padded_codes),
        codes16=codebook.new_empty((heads, padded_codes, padded_width), dtype=torch.float16),
        codes32=floats(heads, padded_codes, padded_width),
    )
    stored = codebook, codebook.stride(0), codebook.stride(1)
    options = {"BLOCK_R": block_r, "WIDTH": wide, "num_warps": 4, **FUSE}
    grid = padded_codes // block_r, heads
    _lengths_kernel[grid](*stored, tables, num_codes, width, **options)
    _short_sums_kernel[(parts, heads)](
        *stored, tables, sums, counts, num_codes, width, SUM_ROWS=_SUM_ROWS, **options
    )  # fmt: skip
    _centre_kernel[grid](
        *stored, x, x.stride(0), x.stride(1), sums, counts, parts, num_codes, x.shape[1], width, padded_width,
        codes.mean, tables, bins, **options,
    )  # fmt: skip
    _prepare_kernel[grid](*stored, tables, bins, codes.mean, num_codes, width, padded_width, *codes[1:], **options)
    return codes
