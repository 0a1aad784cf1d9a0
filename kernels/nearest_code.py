"""Nearest code on a GPU: tensor-core scores of half precision, and float32 scores where those cannot decide.

Each head's codebook is prepared once (`scale_codes`): centred, scaled by a power of two, and rounded to float16, but
for codes far beyond the reach of nearly all vectors. The search (`_search_kernel`) keeps a block of vectors on chip,
likewise centred, scaled and rounded, and passes over the codes with a running minimum. In ``exact`` mode it also keeps
the second smallest score, lists the vectors whose two smallest scores are nearer than the error bound below, and
`_rescore_kernel` scores again, in float32, the codes that the bound leaves as candidates for them. A vector that may
have a code beyond reach as its nearest is listed in either mode, and all those codes are candidates for it: a far code
costs the others neither accuracy nor time.

Float16 rather than bfloat16 or TF32: Hopper multiplies float16 as fast as bfloat16 and twice as fast as TF32; it has
TF32's 11 significant bits, and scaling by powers of two, one per vector and one per codebook, makes up for its range.
So a single product leaves about as few vectors undecided as TF32 does, at half the time; three bfloat16 products would
leave none but take three times as long.

Error bound, for x and c as float32 after centring and scaling, x = xh + xl and c = ch + cl with float16 xh, ch:

    |x.c - xh.ch| <= |xl| |c| + |xh| |cl|           by Cauchy-Schwarz, with the residuals' norms as they are, which is
                                                    three times sharper than 2^-11 (|x| |c| + |x| |c|)
    |xh.ch - computed| <= D 2^-22 |xh| |ch|         products are exact in float32; each addition errs by at most four
                                                    units of 2^-24 of the sum of magnitudes: tensor cores truncate
                                                    terms when aligning them, and truncate the sum
    packing the column: (BLOCK_K + 4) 2^-23 score   the lowest bits of a score hold its column

With E their sum, |c| being the largest within reach, the nearest code's computed score is at most 2 E above the
smallest. The score of a code of at least length F, F > |x|, is at least F^2 / 2 - |x| F: a vector whose least score and
E are together below that need not look beyond reach. What remains of a candidate's error is that of float32 arithmetic:
about u |x| |c|, c being the candidate, which keeps the distance of the code found within 16 u (|x| + |c|)^2, u = 2^-24,
of the least one, c being the farther of the code found and the nearest.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastvq.errors import UnavailableError
from fastvq.kernels.code_statistics import assignment_statistics
from fastvq.kernels.launch import hardware, on_device
from fastvq.kernels.scaled_codes import BEYOND, FUSE, NOTHING, power_of_two, scale_codes, scale_exponent

__all__ = ["nearest_code", "nearest_code_statistics"]

# A row's scale exceeds the codes' by at most 2^20, so that products of tiny rows do not underflow in a score; products
# count at most 2^60 times in a score, where half norms are already far below their rounding.
_LEAST_FACTOR: tl.constexpr = tl.constexpr(-20)
_LARGEST_FACTOR: tl.constexpr = tl.constexpr(60)

# Wider vectors would not leave room on chip.
_LARGEST_WIDTH = 512


class Tiles(NamedTuple):
    """Block sizes of the search: vectors, codes, depth; warps and pipeline stages."""

    block_n: int
    block_k: int
    block_d: int
    warps: int
    stages: int


def search_tiles(width: int, num_codes: int, capability: int) -> Tiles:
    """Tiles of `_search_kernel` for vectors of ``width`` and a compute ``capability`` such as 90.

    128 vectors, since with fewer the codes would have to come from L2 faster than it gives them. 64 codes, since two
    programs of 8 warps and 128 registers then fit on a multiprocessor and one multiplies while the other compares.
    Vectors wider than 128 leave no shared memory for two programs: on Hopper one takes 128 codes at a time, and where
    registers hold the vectors (`_large_multiprocessor`) or beyond 256 the blocks shrink.
    """
    depth = _depth_block(width)
    codes = max(16, triton.next_power_of_2(num_codes))
    if width <= 128:
        return Tiles(128, min(64, codes), depth, 8, 3)
    if width <= 256 and _large_multiprocessor(capability):
        return Tiles(128, min(128 if capability == 90 else 64, codes), depth, 8, 2)
    block_k = 64 if width <= 256 or _large_multiprocessor(capability) else 32
    return Tiles(64, min(block_k, codes), depth, 4, 2)


def rescore_tiles(width: int, num_codes: int, capability: int) -> Tiles:
    """Tiles of `_rescore_kernel`: small ones, since a program does as many rounds as its least decided vector."""
    codes = max(16, triton.next_power_of_2(num_codes))
    if not _large_multiprocessor(capability):
        return Tiles(64, min(64, codes), _depth_block(width), 8, 2)
    if width <= 256:
        return Tiles(64, min(64, codes), _depth_block(width), 4, 2)
    return Tiles(32, min(32, codes), _depth_block(width), 4, 2)


def _large_multiprocessor(capability: int) -> bool:
    """Hopper and data-centre Blackwell: operands of matrix products in shared memory, of which there are 227 KiB."""
    return 90 <= capability < 120


def _depth_block(width: int) -> int:
    return min(64, max(16, triton.next_power_of_2(width)))


@triton.jit
def _row_exponent(x, places, inside, mean, code_exponent, width, BLOCK_D: tl.constexpr, CHUNKS: tl.constexpr):
    """Exponent of each row's scale, and of the factor of its products in a score."""
    cols = tl.arange(0, BLOCK_D)
    top = tl.zeros([places.shape[0]], tl.float32)
    for chunk in range(CHUNKS):
        d = chunk * BLOCK_D + cols
        values = tl.load(x + places[:, None] + d[None, :], mask=inside[:, None] & (d < width)[None, :], other=0.0)
        centred = tl.where((d < width)[None, :], values.to(tl.float32) - tl.load(mean + d)[None, :], 0.0)
        top = tl.maximum(top, tl.max(tl.abs(centred), axis=1))
    exponent = tl.minimum(scale_exponent(top), code_exponent - _LEAST_FACTOR)
    return exponent, tl.minimum(code_exponent - exponent, _LARGEST_FACTOR)


@triton.jit
def _scaled(x, places, inside, mean, scale, d, width):
    """Columns d of the rows, centred and scaled, float32 [R, BLOCK_D]."""
    values = tl.load(x + places[:, None] + d[None, :], mask=inside[:, None] & (d < width)[None, :], other=0.0)
    centred = values.to(tl.float32) - tl.load(mean + d)[None, :]
    return tl.where((d < width)[None, :], centred, 0.0) * scale[:, None]


@triton.jit
def _half_rows(x, places, inside, mean, scale, width, BLOCK_D: tl.constexpr, CHUNKS: tl.constexpr):
    """Rows rounded to float16, CHUNKS x [R, BLOCK_D], and the norms [R] of them and of their residuals."""
    cols = tl.arange(0, BLOCK_D)
    squares = tl.zeros([places.shape[0]], tl.float32)
    residual_squares = tl.zeros([places.shape[0]], tl.float32)
    chunks = ()
    for chunk in tl.static_range(CHUNKS):
        values = _scaled(x, places, inside, mean, scale, chunk * BLOCK_D + cols, width)
        rounded = values.to(tl.float16)
        wide = rounded.to(tl.float32)
        squares += tl.sum(wide * wide, axis=1)
        residual_squares += tl.sum((values - wide) * (values - wide), axis=1)
        chunks = chunks + (rounded,)  # noqa: RUF005
    return chunks, tl.sqrt(squares), tl.sqrt(residual_squares)


@triton.jit
def _products(chunks, codes16, rows, padded, BLOCK_D: tl.constexpr, CHUNKS: tl.constexpr):
    """Products [R, BLOCK_K] of the rows with codes ``rows`` [BLOCK_K]."""
    cols = tl.arange(0, BLOCK_D)
    acc = tl.zeros([chunks[0].shape[0], rows.shape[0]], tl.float32)
    for chunk in tl.static_range(CHUNKS):
        codes = tl.load(codes16 + rows[:, None] * padded + (chunk * BLOCK_D + cols)[None, :])
        acc = tl.dot(chunks[chunk], tl.trans(codes), acc)
    return acc


@triton.jit
def _search_kernel(
    x, stride_h, stride_n, mean, exponents, bounds, halves, codes16, indices, limits, undecided, num_undecided,
    num_rows, width, padded, num_blocks, none,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, CHUNKS: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Index of the smallest score of each vector, ``none`` where no score is finite."""
    head = tl.program_id(1).to(tl.int64)
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = rows < num_rows
    places = head * stride_h + rows * stride_n
    mean += head * padded
    codes16 += head * num_blocks * BLOCK_K * padded
    halves += head * num_blocks * BLOCK_K
    code_exponent = tl.load(exponents + head * 2)
    code_norm = tl.load(bounds + head * 2)

    exponent, factor_exponent = _row_exponent(x, places, inside, mean, code_exponent, width, BLOCK_D, CHUNKS)
    factor = power_of_two(factor_exponent)
    scale = power_of_two(exponent)
    chunks, norm, residual_norm = _half_rows(x, places, inside, mean, scale, width, BLOCK_D, CHUNKS)
    # Makes every score at least 1: then the order of scores is that of their bits, and among equal scores packing
    # the column into the lowest bits makes the first the smallest. 1.01 covers the rounding of norms and products.
    shift = 1.01 * factor * norm * code_norm + 1
    # Few numbers for each vector, since they stay in registers while codes pass by.
    code_residual = tl.load(bounds + head * 2 + 1)
    error = residual_norm * code_norm + norm * (code_residual + padded * (2.0**-22) * code_norm)
    error = 1.01 * factor * error
    # Below it no score is that of a code beyond reach. 1.01 and 0.99 cover the rounding of lengths. A lesser `far`
    # claims less, and its square stays in range.
    far_exponent = tl.load(exponents + head * 2 + 1)
    far = 0.99 * power_of_two(tl.minimum(far_exponent + code_exponent, 60))
    far = tl.where(far_exponent < NOTHING, far, float("inf"))
    length = 1.01 * factor * (norm + residual_norm)
    horizon = tl.where(far > length, far * (far / 2 - length), -float("inf"))

    cols = tl.arange(0, BLOCK_K)
    low: tl.constexpr = BLOCK_K - 1
    least = tl.full([BLOCK_N], float("inf"), tl.float32)
    second = tl.full([BLOCK_N], float("inf"), tl.float32)
    found = tl.zeros([BLOCK_N], tl.int32)
    for block in range(num_blocks):
        codes = block * BLOCK_K + cols
        acc = _products(chunks, codes16, codes, padded, BLOCK_D, CHUNKS)
        # In this order everything is in the layout of acc, and the first two operations are one.
        scores = tl.load(halves + codes)[None, :] - acc * factor[:, None] + shift[:, None]
        packed = (scores.to(tl.int32, bitcast=True) & ~low) | cols[None, :]
        packed = packed.to(tl.float32, bitcast=True)  # [BLOCK_N, BLOCK_K], no two equal in a row
        if EXACT:
            left, right = tl.split(tl.reshape(packed, [BLOCK_N, BLOCK_K // 2, 2]))
            smaller, larger = tl.minimum(left, right), tl.maximum(left, right)
            first = tl.min(smaller, axis=1)
            after = tl.min(tl.where(smaller == first[:, None], larger, smaller), axis=1)
            second = tl.minimum(tl.minimum(second, after), tl.maximum(first, least))
        else:
            first = tl.min(packed, axis=1)
        bits = first.to(tl.int32, bitcast=True)
        first = (bits & ~low).to(tl.float32, bitcast=True)
        better = first < least
        found = tl.where(better, block * BLOCK_K + (bits & low), found)
        least = tl.where(better, first, least)

    # Not finite: no usable code, NaN, or a score that float32 cannot hold once unscaled, in two steps to stay in range.
    unscale = -(code_exponent + exponent + factor_exponent)
    half = unscale >> 1
    score = (least - shift) * power_of_two(half) * power_of_two(unscale - half)
    finite = (least < BEYOND / 2) & (tl.abs(score) < float("inf"))
    tl.store(indices + head * num_rows + rows, tl.where(finite, found, none).to(tl.int64), mask=inside)
    error += 1.01 * (BLOCK_K + 4) * (2.0**-23) * least
    beyond = (least - shift + error < horizon) == 0
    unsure = beyond
    if EXACT:
        unsure = unsure | ((second > least + 2 * error) == 0)
    unsure = unsure & inside & finite
    tl.store(limits + head * num_rows + rows, least - shift + 2 * error, mask=unsure)
    marks = unsure.to(tl.int32)
    slots = tl.atomic_add(num_undecided + head, tl.sum(marks, axis=0)) + tl.cumsum(marks, axis=0) - marks
    # Negative where codes beyond reach are candidates too.
    listed = tl.where(beyond, -1 - rows, rows).to(tl.int32)
    tl.store(undecided + head * num_rows + slots, listed, mask=unsure)


@triton.jit
def _rescore_kernel(
    x, stride_h, stride_n, mean, exponents, halves, codes16, codes32, indices, limits, undecided, num_undecided,
    num_rows, width, padded, num_blocks, num_padded_codes,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """Float32 scores of the candidates of the listed vectors: codes whose float16 score is within the limit, and those
    beyond reach where the list says so.
    """
    head = tl.program_id(1).to(tl.int64)
    mean += head * padded
    codes16 += head * num_padded_codes * padded
    codes32 += head * num_padded_codes * padded
    halves += head * num_padded_codes
    code_exponent = tl.load(exponents + head * 2)
    cols = tl.arange(0, BLOCK_K)
    number = tl.load(num_undecided + head)
    for first in range(tl.program_id(0) * BLOCK_N, number, tl.num_programs(0) * BLOCK_N):
        slots = first + tl.arange(0, BLOCK_N)
        inside = slots < number
        listed = tl.load(undecided + head * num_rows + slots, mask=inside, other=0)
        beyond = listed < 0
        rows = tl.where(beyond, -1 - listed, listed).to(tl.int64)
        places = head * stride_h + rows * stride_n
        exponent, factor_exponent = _row_exponent(x, places, inside, mean, code_exponent, width, BLOCK_D, CHUNKS)
        factor = power_of_two(factor_exponent)
        scale = power_of_two(exponent)
        chunks, _norm, _residual_norm = _half_rows(x, places, inside, mean, scale, width, BLOCK_D, CHUNKS)
        limit = tl.load(limits + head * num_rows + rows, mask=inside, other=-float("inf"))
        least = tl.full([BLOCK_N], float("inf"), tl.float32)
        found = tl.zeros([BLOCK_N], tl.int32)
        for block in range(num_blocks):
            codes = block * BLOCK_K + cols
            acc = _products(chunks, codes16, codes, padded, BLOCK_D, CHUNKS)
            half = tl.load(halves + codes)
            scores = half[None, :] - acc * factor[:, None]
            candidate = (scores <= limit[:, None]) | (beyond[:, None] & (half == BEYOND)[None, :])
            left = tl.where(candidate & inside[:, None], cols[None, :], BLOCK_K)
            rounds = tl.max(tl.sum((left < BLOCK_K).to(tl.int32), axis=1), axis=0)
            for _step in range(rounds):
                column = tl.min(left, axis=1)
                left = tl.where(left == column[:, None], BLOCK_K, left)
                has = column < BLOCK_K
                code = block * BLOCK_K + tl.where(has, column, 0)
                product = tl.zeros([BLOCK_N], tl.float32)
                square = tl.zeros([BLOCK_N], tl.float32)
                for chunk in range(CHUNKS):
                    d = chunk * BLOCK_D + tl.arange(0, BLOCK_D)
                    values = _scaled(x, places, has, mean, scale, d, width)
                    other = tl.load(codes32 + code[:, None] * padded + d[None, :], mask=has[:, None], other=0.0)
                    # By the vector's scale: codes beyond reach have none.
                    other = other * scale[:, None]
                    product += tl.sum(values * other, axis=1)
                    square += tl.sum(other * other, axis=1)
                score = square / 2 - product
                better = has & (score < least)
                least = tl.where(better, score, least)
                found = tl.where(better, code, found)
        tl.store(indices + head * num_rows + rows, found.to(tl.int64), mask=inside & (least < float("inf")))


@torch.no_grad()
def nearest_code(x: Tensor, codebook: Tensor, *, mode: str) -> Tensor:
    """Index of the nearest code, as `fastvq.ops.nearest_code` defines it.

    Args:
        x: [H, N, D], float32, bfloat16 or float16, any strides; D <= 512.
        codebook: [H, K, D], any of these types, on the same device.
        mode: ``exact``, or ``fast``: no score is computed again in float32 but for codes beyond reach. The squared
            distance of the code found exceeds the least by at most 4 E of the module's bound, which is below
            2^-7 |x| max|c| + 2^-14 max|c|^2 for x and c as centred and codes within reach: up to 8 to 16 times as long
            as nearly all vectors or the shortest code.

    Returns:
        int64 [H, N]; 0 where no code has a finite score.
    """
    with on_device(x.device):
        return _search(_unit_stride(x), _unit_stride(codebook), mode == "exact", none=0)


@torch.no_grad()
def nearest_code_statistics(
    x: Tensor, codebook: Tensor, mask: Tensor | None, *, mode: str, deterministic: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`nearest_code`, and what training needs of the assignment.

    Args:
        x, codebook, mode: as for `nearest_code`.
        mask: bool [H, N] or None; vectors where it is False are left out of all but the indices.
        deterministic: the same bits in every run; no floating-point atomics.

    Returns:
        Squared error float32 [H], sums float32 [H, K, D], counts int64 [H, K], indices int64 [H, N].
    """
    with on_device(x.device):
        x, codebook = _unit_stride(x), _unit_stride(codebook)
        indices = _search(x, codebook, mode == "exact", none=-1)
        return *assignment_statistics(x, codebook, indices, mask, deterministic), indices


def _search(x: Tensor, codebook: Tensor, exact: bool, none: int) -> Tensor:
    heads, num_rows, width = x.shape
    num_codes = codebook.shape[1]
    indices = x.new_empty((heads, num_rows), dtype=torch.int64)
    if indices.numel() == 0 or width == 0:
        return indices.zero_()
    if width > _LARGEST_WIDTH:
        raise UnavailableError(f"x: expected vectors of at most {_LARGEST_WIDTH} numbers for Triton, got {width}")
    capability, processors = hardware(x.device)
    tiles = search_tiles(width, num_codes, capability)
    again = rescore_tiles(width, num_codes, capability)
    chunks = triton.cdiv(width, tiles.block_d)
    padded = chunks * tiles.block_d
    rows = max(tiles.block_k, again.block_k)
    padded_codes = triton.cdiv(num_codes, rows) * rows
    codes = scale_codes(codebook, x, padded_codes, padded)
    limits = x.new_empty((heads, num_rows), dtype=torch.float32)
    undecided = x.new_empty((heads, num_rows), dtype=torch.int32)
    num_undecided = x.new_zeros(heads, dtype=torch.int32)
    _search_kernel[(triton.cdiv(num_rows, tiles.block_n), heads)](
        x, x.stride(0), x.stride(1), codes.mean, codes.exponents, codes.bounds, codes.halves, codes.codes16,
        indices, limits, undecided, num_undecided, num_rows, width, padded, padded_codes // tiles.block_k, none,
        BLOCK_N=tiles.block_n, BLOCK_K=tiles.block_k, BLOCK_D=tiles.block_d, CHUNKS=chunks, EXACT=exact,
        num_warps=tiles.warps, num_stages=tiles.stages, **FUSE,
    )  # fmt: skip
    # How many vectors are listed only the device knows: a fixed grid strides over them.
    programs = min(triton.cdiv(num_rows, again.block_n), 2 * processors)
    _rescore_kernel[(programs, heads)](
        x, x.stride(0), x.stride(1), codes.mean, codes.exponents, codes.halves, codes.codes16, codes.codes32,
        indices, limits, undecided, num_undecided, num_rows, width, padded, padded_codes // again.block_k,
        padded_codes,
        BLOCK_N=again.block_n, BLOCK_K=again.block_k, BLOCK_D=again.block_d, CHUNKS=chunks,
        num_warps=again.warps, num_stages=again.stages, **FUSE,
    )  # fmt: skip
    return indices


def _unit_stride(value: Tensor) -> Tensor:
    return value if value.stride(-1) == 1 else value.contiguous()
