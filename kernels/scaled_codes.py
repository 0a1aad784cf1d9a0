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
def _load_codes(codebook_ptr, codebook_stride_k, offs_k, num_codes, width, offs_d):
    """Codes offs_k [K] as float32 [K, D], zeros where they are not usable, and which are, as bool [K]."""
    mask = (offs_k < num_codes)[:, None] & (offs_d < width)[None, :]  # [K, D]
    codebook_ptrs = codebook_ptr + offs_k.to(tl.int64)[:, None] * codebook_stride_k + offs_d[None, :]  # [K, D]
    codes = tl.load(codebook_ptrs, mask=mask, other=0.0)  # [K, D]
    codes = codes.to(tl.float32)
    bad = (tl.abs(codes) < _LARGEST) == 0  # [K, D]
    usable = (offs_k < num_codes) & (tl.max(bad.to(tl.int32), axis=1) == 0)  # [K]
    return tl.where(usable[:, None], codes, 0.0), usable


@triton.jit
def _length_bins(values):
    """Exponent of the length of each row of values [R, D], as a number of a bin [R]; -1 where it is not finite."""
    top = tl.max(tl.abs(values), axis=1)  # [R]
    exponent = tl.minimum(tl.maximum((top.to(tl.int32, bitcast=True) >> 23) - 127, -100), 126)  # [R]
    scaled = values * power_of_two(-exponent)[:, None]  # [R, D]
    squares = tl.sum(scaled * scaled, axis=1)  # [R]
    # Shifted down rather than divided, which is the floor of half a negative exponent too.
    length = exponent + (((squares.to(tl.int32, bitcast=True) >> 23) - 127) >> 1)  # [R]
    return tl.where(squares < float("inf"), tl.maximum(length + _ZERO_BIN, 0), -1)


@triton.jit
def _count(table_ptr, bins):
    """Adds bins [R] to a table; -1 is none of them."""
    offs_bin = tl.arange(0, _BINS)  # [_BINS]
    counts = tl.sum((bins[:, None] == offs_bin[None, :]).to(tl.int32), axis=0)  # [_BINS]
    tl.atomic_add(table_ptr + offs_bin, counts, mask=counts > 0)


@triton.jit
def _lengths_kernel(
    codebook_ptr, codebook_stride_h, codebook_stride_k, tables_ptr, num_codes, width,
    BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Counts the lengths of codes in the head's first table."""
    head = tl.program_id(1).to(tl.int64)
    offs_k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)  # [BLOCK_K]
    offs_d = tl.arange(0, BLOCK_D)  # [BLOCK_D]
    # [BLOCK_K, BLOCK_D], [BLOCK_K]
    codes, usable = _load_codes(
        codebook_ptr + head * codebook_stride_h, codebook_stride_k, offs_k, num_codes, width, offs_d
    )
    _count(tables_ptr + head * 3 * _BINS, tl.where(usable, _length_bins(codes), -1))


@triton.jit
def _short_sums_kernel(
    codebook_ptr, codebook_stride_h, codebook_stride_k, tables_ptr, sums_ptr, counts_ptr, num_codes, width,
    SUM_ROWS: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Sum and number of the short codes in each run of SUM_ROWS codes."""
    part = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    slot = head * tl.num_programs(0) + part
    running = tl.cumsum(tl.load(tables_ptr + head * 3 * _BINS + tl.arange(0, _BINS)), axis=0)  # [_BINS]
    second = tl.sum((running < tl.minimum(tl.max(running, axis=0), 2)).to(tl.int32), axis=0)
    offs_d = tl.arange(0, BLOCK_D)  # [BLOCK_D]
    total = tl.zeros([BLOCK_D], tl.float32)  # [BLOCK_D]
    number = tl.zeros([BLOCK_K], tl.int32)  # [BLOCK_K]
    for first in range(0, SUM_ROWS, BLOCK_K):
        offs_k = part * SUM_ROWS + first + tl.arange(0, BLOCK_K)  # [BLOCK_K]
        # [BLOCK_K, BLOCK_D], [BLOCK_K]
        codes, usable = _load_codes(
            codebook_ptr + head * codebook_stride_h, codebook_stride_k, offs_k, num_codes, width, offs_d
        )
        short = usable & (_length_bins(codes) <= second + 1)  # [BLOCK_K]
        total += tl.sum(tl.where(short[:, None], codes, 0.0), axis=0)  # [BLOCK_D]
        number += short.to(tl.int32)  # [BLOCK_K]
    tl.store(sums_ptr + slot * BLOCK_D + offs_d, total)
    tl.store(counts_ptr + slot, tl.sum(number, axis=0))


@triton.jit
def _centre_kernel(
    codebook_ptr, codebook_stride_h, codebook_stride_k, x_ptr, x_stride_h, x_stride_n, sums_ptr, counts_ptr, parts,
    num_codes, num_rows, width, padded, mean_ptr, tables_ptr, bins_ptr,
    BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The centre; the bin of each code's length from there, -1 if it is not usable; tables of these and of vectors'."""
    head = tl.program_id(1).to(tl.int64)
    offs_d = tl.arange(0, BLOCK_D)  # [BLOCK_D]
    total = tl.zeros([BLOCK_D], tl.float32)  # [BLOCK_D]
    number = 0
    for part in range(parts):
        slot = head * parts + part
        total += tl.load(sums_ptr + slot * BLOCK_D + offs_d)  # [BLOCK_D]
        number += tl.load(counts_ptr + slot)
    centre = total / tl.maximum(number, 1).to(tl.float32)  # [BLOCK_D]
    if tl.program_id(0) == 0:
        tl.store(mean_ptr + head * padded + offs_d, centre, mask=offs_d < padded)

    offs_k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)  # [BLOCK_K]
    # [BLOCK_K, BLOCK_D], [BLOCK_K]
    codes, usable = _load_codes(
        codebook_ptr + head * codebook_stride_h, codebook_stride_k, offs_k, num_codes, width, offs_d
    )
    found = tl.where(usable, _length_bins(codes - centre[None, :]), -1)  # [BLOCK_K]
    tl.store(bins_ptr + head * tl.num_programs(0) * BLOCK_K + offs_k, found)
    _count(tables_ptr + (head * 3 + 1) * _BINS, found)
    # As many vectors as codes, from everywhere.
    offs_n = offs_k.to(tl.int64) * num_rows // (tl.num_programs(0) * BLOCK_K)  # [BLOCK_K]
    x_ptrs = x_ptr + head * x_stride_h + offs_n[:, None] * x_stride_n + offs_d[None, :]  # [BLOCK_K, BLOCK_D]
    vectors = tl.load(x_ptrs, mask=(offs_d < width)[None, :], other=0.0).to(tl.float32)  # [BLOCK_K, BLOCK_D]
    _count(tables_ptr + (head * 3 + 2) * _BINS, _length_bins(vectors - centre[None, :]))


@triton.jit
def _prepare_kernel(
    codebook_ptr, codebook_stride_h, codebook_stride_k, tables_ptr, bins_ptr, mean_ptr, num_codes, width, padded,
    exponents_ptr, bounds_ptr, halves_ptr, codes16_ptr, codes32_ptr,
    BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Centres, scales and rounds the codes; the largest |c| and |cl| within reach go to bounds [H, 2]."""
    head = tl.program_id(1).to(tl.int64)
    offs_bin = tl.arange(0, _BINS)  # [_BINS]
    present = tl.load(tables_ptr + (head * 3 + 1) * _BINS + offs_bin) > 0  # [_BINS]
    running = tl.cumsum(tl.load(tables_ptr + (head * 3 + 2) * _BINS + offs_bin), axis=0)  # [_BINS]
    # Reached by 15 of 16 vectors.
    typical = tl.sum((16 * running < 15 * tl.max(running, axis=0)).to(tl.int32), axis=0)
    shortest = tl.min(tl.where(present, offs_bin, _BINS), axis=0)
    reach = tl.maximum(typical, shortest) + _REACH
    longest = tl.max(tl.where(present & (offs_bin < reach), offs_bin, 0), axis=0)
    beyond = tl.min(tl.where(present & (offs_bin >= reach), offs_bin - _ZERO_BIN, NOTHING), axis=0)
    exponent = _TOP - tl.maximum(longest - _ZERO_BIN, -100)
    if tl.program_id(0) == 0:
        tl.store(exponents_ptr + head * 2, exponent)
        tl.store(exponents_ptr + head * 2 + 1, beyond)

    offs_d = tl.arange(0, BLOCK_D)  # [BLOCK_D]
    offs_k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)  # [BLOCK_K]
    offs_code = head * tl.num_programs(0) * BLOCK_K + offs_k  # [BLOCK_K], over all heads
    # [BLOCK_K, BLOCK_D], [BLOCK_K]
    codes, usable = _load_codes(
        codebook_ptr + head * codebook_stride_h, codebook_stride_k, offs_k, num_codes, width, offs_d
    )
    centre = tl.load(mean_ptr + head * padded + offs_d, mask=offs_d < width, other=0.0)  # [BLOCK_D]
    codes = tl.where(usable[:, None], codes - centre[None, :], 0.0)  # [BLOCK_K, BLOCK_D]
    near = usable & (tl.load(bins_ptr + offs_code) < reach)  # [BLOCK_K]
    scaled = tl.where(near[:, None], codes * power_of_two(exponent), 0.0)  # [BLOCK_K, BLOCK_D]
    rounded = scaled.to(tl.float16)  # [BLOCK_K, BLOCK_D]
    residual = scaled - rounded.to(tl.float32)  # [BLOCK_K, BLOCK_D]
    squares = tl.sum(scaled * scaled, axis=1)  # [BLOCK_K]
    tl.store(halves_ptr + offs_code, tl.where(near, squares / 2, tl.where(usable, BEYOND, UNUSABLE)))
    offs = offs_code[:, None] * padded + offs_d[None, :]  # [BLOCK_K, BLOCK_D]
    mask = (offs_d < padded)[None, :] & (offs_k >= 0)[:, None]  # [BLOCK_K, BLOCK_D]
    tl.store(codes16_ptr + offs, rounded, mask=mask)
    tl.store(codes32_ptr + offs, codes, mask=mask)
    tl.atomic_max(bounds_ptr + head * 2, tl.sqrt(tl.max(squares, axis=0)))
    tl.atomic_max(bounds_ptr + head * 2 + 1, tl.sqrt(tl.max(tl.sum(residual * residual, axis=1), axis=0)))


def scale_codes(codebook: Tensor, x: Tensor, padded_codes: int, padded_width: int) -> ScaledCodes:
    """Prepares a codebook [H, K, D] for vectors x [H, N, D], both with a last axis of stride 1."""
    heads, num_codes, width = codebook.shape
    parts = triton.cdiv(num_codes, _SUM_ROWS)
    wide = triton.next_power_of_2(padded_width)
    # What registers have room for, and a divisor of padded_codes.
    block_k = min(32 if wide <= 128 else 16, padded_codes & -padded_codes)

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
    options = {"BLOCK_K": block_k, "BLOCK_D": wide, "num_warps": 4, **FUSE}
    grid = padded_codes // block_k, heads
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
